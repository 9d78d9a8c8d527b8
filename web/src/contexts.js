// Tokens of text shaded by a node's value or by what the encoder reads, the value on hover.
import { h, vary } from "./dom.js";
import { signed, visible } from "./format.js";
import { hideTip, showTip } from "./tooltip.js";

/** @typedef {import("./types.js").Context} Context */

/**
 * The largest sizes of values and of readings, over all contexts: one scale for the whole view.
 * @param {Context[]} contexts
 */
export function contextScale(contexts) {
  const largest = (/** @type {number[]} */ values) =>
    values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-9);
  return {
    values: largest(contexts.flatMap((one) => one.values)),
    readings: largest(contexts.flatMap((one) => one.readings ?? [])),
  };
}

/**
 * @param {string} title
 * @param {Context[]} contexts
 * @param {{values: number, readings: number}} scale
 * @param {string} none what to say if there are none
 * @param {boolean} [wide] over two columns
 */
export function contextList(title, contexts, scale, none, wide = false) {
  return h(
    "div",
    { class: wide ? "contexts wide" : "contexts" },
    h("h3", {}, title),
    contexts.length === 0
      ? h("p", { class: "quiet" }, none)
      : h("ol", {}, ...contexts.map((context) => contextRow(context, scale))),
  );
}

/**
 * @param {Context} context
 * @param {{values: number, readings: number}} scale
 */
function contextRow(context, scale) {
  const { tokens, values, readings, at } = context;
  const reading = readings?.[at];
  return h(
    "li",
    { title: `row ${context.row}, position ${context.position}` },
    h(
      "span",
      { class: "context-value" },
      h("span", { class: "value" }, signed(context.value, 2)),
      reading !== undefined && h("span", { class: "quiet" }, signed(reading, 2)),
    ),
    h(
      "span",
      { class: "tokens" },
      ...tokens.map((token, i) => shaded(token, values[i], readings?.[i] ?? null, scale, i === at)),
    ),
  );
}

/**
 * @param {string} token
 * @param {number} value
 * @param {number | null} reading
 * @param {{values: number, readings: number}} scale
 * @param {boolean} center
 */
function shaded(token, value, reading, scale, center) {
  const element = vary(
    h(
      "span",
      { class: `tk${sign("v", value)}${sign("r", reading ?? 0)}${center ? " at" : ""}` },
      token.replaceAll("\n", "↵\n"),
    ),
    { "--v": (Math.abs(value) / scale.values).toFixed(3), "--r": (Math.abs(reading ?? 0) / scale.readings).toFixed(3) },
  );
  element.addEventListener("mouseenter", () =>
    showTip(element, [
      h("strong", {}, visible(token)),
      ` ${signed(value)}`,
      reading === null ? null : h("span", {}, ` · encoder reads ${signed(reading)}`),
    ]),
  );
  element.addEventListener("mouseleave", hideTip);
  return element;
}

/**
 * @param {string} letter
 * @param {number} value
 */
function sign(letter, value) {
  return value > 0 ? ` ${letter}-pos` : value < 0 ? ` ${letter}-neg` : "";
}
