// The attention pattern of a head on a prompt: queries down, keys across, and what goes to the sink.
import { h, s } from "../dom.js";
import { num, visible } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { scroller, tableView } from "../ui.js";
import { canvas } from "./axes.js";

const CELL = 22;
const CHARACTER = 7.4;

/** @param {import("../types.js").Circuit["attention"]} heads */
export function attentionView(heads) {
  const box = h("div", {});
  const headSelect = select(
    "head",
    heads.map((one) => `layer ${one.layer}, head ${one.head}`),
    () => (fillPrompts(), show()),
  );
  const promptSelect = select("prompt", [], show);
  function fillPrompts() {
    const { prompts } = heads[headSelect.input.selectedIndex];
    const before = Math.max(promptSelect.input.selectedIndex, 0);
    promptSelect.input.replaceChildren(...prompts.map((prompt) => h("option", {}, prompt.name)));
    promptSelect.input.selectedIndex = Math.min(before, prompts.length - 1);
  }
  function show() {
    const prompt = heads[headSelect.input.selectedIndex].prompts[promptSelect.input.selectedIndex];
    if (prompt) box.replaceChildren(scroller("Attention pattern", pattern(prompt)), table(prompt));
  }
  fillPrompts();
  show();
  return h(
    "div",
    { class: "attention" },
    h("div", { class: "controls" }, headSelect.element, promptSelect.element),
    box,
  );
}

/**
 * @param {string} name
 * @param {string[]} options
 * @param {() => void} changed
 */
function select(name, options, changed) {
  const input = h("select", { onchange: changed }, ...options.map((option) => h("option", {}, option)));
  return { input, element: h("label", {}, h("span", { class: "quiet" }, name), " ", input) };
}

/** @param {number[]} row */
function sink(row) {
  return Math.max(0, 1 - row.reduce((a, b) => a + b, 0));
}

/** @param {import("../types.js").AttentionPrompt} prompt */
function pattern({ tokens, pattern: rows }) {
  const longest = Math.max(4, ...tokens.map((token) => visible(token).length));
  const label = longest * CHARACTER + 12;
  // The sink stands apart, before the first key.
  const x = (/** @type {number} */ key) => label + 6 + (key + 1) * CELL + (key < 0 ? -6 : 0);
  const y = (/** @type {number} */ query) => label + query * CELL;
  const cells = rows.flatMap((row, query) =>
    [sink(row), ...row].map((weight, at) => cell(tokens, query, at - 1, weight, x(at - 1), y(query))),
  );
  const name = (/** @type {string} */ text, /** @type {number} */ key) =>
    s(
      "text",
      { class: "token-label", transform: `translate(${x(key) + CELL / 2},${label - 6})rotate(-90)`, dy: "0.35em" },
      text,
    );
  return canvas(
    x(tokens.length) + 10,
    y(tokens.length) + 8,
    "Attention: a row for each query, a column for each key",
    s("text", { class: "axis-name", x: label - 8, y: label - 8, "text-anchor": "end" }, "query ↓ key →"),
    name("sink", -1),
    tokens.map((token, key) => name(visible(token), key)),
    tokens.map((token, query) =>
      s(
        "text",
        { class: "token-label", x: label - 6, y: y(query) + CELL / 2, dy: "0.35em", "text-anchor": "end" },
        visible(token),
      ),
    ),
    cells,
  );
}

/**
 * @param {string[]} tokens
 * @param {number} query
 * @param {number} key
 * @param {number} weight
 * @param {number} x
 * @param {number} y
 */
function cell(tokens, query, key, weight, x, y) {
  if (key > query) return null;
  const group = s(
    "g",
    { class: key < 0 ? "cell sink" : "cell" },
    s("rect", { class: "empty", x: x + 0.5, y: y + 0.5, width: CELL - 1, height: CELL - 1 }),
    s("rect", {
      class: "weight",
      x: x + 0.5,
      y: y + 0.5,
      width: CELL - 1,
      height: CELL - 1,
      "fill-opacity": Math.min(Math.max(weight, 0), 1).toFixed(3),
    }),
  );
  group.addEventListener("mouseenter", () =>
    showTip(
      group,
      tipLines(num(weight), [
        ["from", visible(tokens[query])],
        ["to", key < 0 ? "the sink" : visible(tokens[key])],
      ]),
    ),
  );
  group.addEventListener("mouseleave", hideTip);
  return group;
}

/** @param {import("../types.js").AttentionPrompt} prompt */
function table({ tokens, pattern: rows }) {
  return tableView("attention pattern", ["query", "sink", ...tokens.map(visible)], () =>
    rows.map((row, query) => [
      visible(tokens[query]),
      num(sink(row), 2),
      ...row.map((weight, key) => (key > query ? "" : num(weight, 2))),
    ]),
  );
}
