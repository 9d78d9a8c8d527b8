// A circuit's graph with its controls: a threshold on the size of the weights, and zoom.
import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { h, responsive, s } from "../dom.js";
import { count, many, num } from "../format.js";
import { scroller } from "../ui.js";
import { drawGraph } from "./circuit-drawing.js";
import { firstFrom, MANY } from "./circuit-edges.js";

/** @typedef {import("../types.js").Circuit} Circuit */

const STEPS = 400;

/** @param {Circuit} circuit */
export function circuitGraph(circuit) {
  const weights = circuit.edges
    .filter((edge) => edge.kind === "weight")
    .sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
  const sizes = weights.map((edge) => Math.abs(edge.weight));
  const largest = sizes.at(-1) ?? 0;
  /** @type {{hidden: number, update: (() => void) | null}} */
  const state = { hidden: 0, update: null };
  const told = h("output", { "aria-live": "polite" });
  const slider = h("input", {
    type: "range",
    min: 0,
    max: STEPS,
    step: 1,
    value: 0,
    "aria-label": "Hide weights smaller than",
  });
  slider.addEventListener("input", () => threshold());
  function threshold() {
    const least = (Number(slider.value) / STEPS) * largest;
    state.hidden = firstFrom(sizes, least - 1e-12);
    state.update?.();
    told.textContent =
      `|weight| ≥ ${num(least)}: ` +
      `${many(weights.length - state.hidden, "weight")} shown, ${count(state.hidden)} hidden`;
    slider.setAttribute("aria-valuetext", told.textContent);
  }
  const zoomer = zoom().scaleExtent([0.5, 6]).filter(zoomFilter);
  const tools = h("div", { class: "tools" });
  const plot = responsive((width) => {
    const { element, svg, update } = drawGraph(circuit, weights, width, () => state.hidden, zoomer);
    state.update = update;
    update();
    tools.replaceChildren(...zoomButtons(svg, zoomer));
    return element;
  }, "plot circuit");
  threshold();
  return h(
    "div",
    { class: "circuit-graph" },
    h(
      "div",
      { class: "controls" },
      h("label", {}, h("span", { class: "quiet" }, "threshold"), " ", slider),
      told,
      tools,
    ),
    scroller("Circuit graph", plot),
    legend(weights.length > MANY),
  );
}

/**
 * Drag moves; the wheel zooms with a modifier only, and touch with two fingers, so that the page can be scrolled.
 * @param {any} event
 */
function zoomFilter(event) {
  if (event.type === "wheel") return event.ctrlKey || event.metaKey;
  if (event.type.startsWith("touch")) return event.touches.length > 1;
  return !event.button && !(event.target instanceof Element && event.target.closest("a"));
}

/**
 * @param {SVGSVGElement} svg
 * @param {any} zoomer
 */
function zoomButtons(svg, zoomer) {
  const target = /** @type {any} */ (select(svg));
  const button = (/** @type {string} */ text, /** @type {string} */ name, /** @type {() => void} */ act) =>
    h("button", { type: "button", "aria-label": name, title: name, onclick: act }, text);
  return [
    button("+", "Zoom in", () => target.call(zoomer.scaleBy, 1.4)),
    button("−", "Zoom out", () => target.call(zoomer.scaleBy, 1 / 1.4)),
    button("reset", "Reset zoom", () => target.call(zoomer.transform, zoomIdentity)),
  ];
}

/** @param {boolean} crowded whether there are too many weights for dashes */
function legend(crowded) {
  const line = (/** @type {string} */ name, /** @type {string} */ text) =>
    h(
      "span",
      { class: "key-line" },
      s(
        "svg",
        { width: 34, height: 10, "aria-hidden": "true" },
        s("path", { class: `edge ${name}`, d: "M1,5H33", "stroke-width": 2.5 }),
      ),
      text,
    );
  return h(
    "p",
    { class: "keys quiet" },
    line("positive", "positive weight"),
    line("negative", `negative weight${crowded ? ` (not dashed while over ${MANY} are shown)` : ""}`),
    line("stream", "a write read again, not a weight"),
    h(
      "span",
      {},
      "Line width: size of the weight. Circle size: change of the loss when the node alone is frozen at its mean. " +
        "The pointer on a line tells its weight, on a node its figures. Arrow keys move between nodes, Enter opens " +
        "one; drag moves, Ctrl and wheel zooms.",
    ),
  );
}
