// A circuit as a graph: nodes in columns, nonzero weights as edges, a threshold on their size.
import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { h, responsive, s } from "../dom.js";
import { count, describeNode, many, num, signed } from "../format.js";
import { href } from "../router.js";
import { scroller } from "../ui.js";
import { circuitLayout, edgeMiddle, wrap } from "./circuit-layout.js";
import { edgePaths, MANY, roughly, showFrom } from "./circuit-edges.js";
import { mountHighlight } from "./circuit-highlight.js";
import { mountArrowKeys } from "./circuit-keys.js";

/** @typedef {import("../types.js").Circuit} Circuit */
/** @typedef {import("../types.js").CEdge} CEdge */
/** @typedef {import("./circuit-layout.js").Layout} Layout */

/**
 * @typedef {object} Graph what is drawn
 * @property {Circuit} circuit
 * @property {Layout} layout
 * @property {CEdge[]} weights by growing size, so that those under a threshold come first
 * @property {{largest: number, many: boolean}} scale of the edges' widths
 * @property {SVGElement[]} paths of the weights
 * @property {SVGElement[]} labels of the weights; none if there are many
 * @property {SVGAElement[]} nodes
 * @property {SVGGElement} back what fades while a node's neighbours stand out
 * @property {SVGGElement} front
 */

const NAMED_WEIGHTS = 16;
const STEPS = 400;
const TOKEN_LINE = 15;

/** @param {Circuit} circuit */
export function circuitGraph(circuit) {
  const weights = circuit.edges
    .filter((edge) => edge.kind === "weight")
    .sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
  const largest = Math.abs(weights.at(-1)?.weight ?? 0);
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
    state.hidden = weights.findIndex((edge) => Math.abs(edge.weight) >= least - 1e-12);
    state.update?.();
    told.textContent =
      `|weight| ≥ ${num(least)}: ` +
      `${many(weights.length - state.hidden, "weight")} shown, ${count(state.hidden)} hidden`;
    slider.setAttribute("aria-valuetext", told.textContent);
  }
  const zoomer = zoom().scaleExtent([0.5, 6]).filter(zoomFilter);
  const tools = h("div", { class: "tools" });
  const plot = responsive((width) => {
    const { svg, update } = drawGraph(circuit, weights, width, () => state.hidden, zoomer);
    state.update = update;
    update();
    tools.replaceChildren(...zoomButtons(svg, zoomer));
    return svg;
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
    legend(),
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

function legend() {
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
    line("negative", "negative weight"),
    line("stream", "a write read again, not a weight"),
    "line width: size of the weight; circle: loss when the node alone is frozen at its mean. Arrow " +
      "keys move between nodes, Enter opens one; drag moves, Ctrl and wheel zooms.",
  );
}

/**
 * @param {Circuit} circuit
 * @param {CEdge[]} weights
 * @param {number} width
 * @param {() => number} hidden how many of the weights are
 * @param {any} zoomer
 */
function drawGraph(circuit, weights, width, hidden, zoomer) {
  const layout = circuitLayout(circuit, width);
  const scale = { largest: Math.abs(weights.at(-1)?.weight ?? 0) || 1, many: weights.length > MANY };
  const paths = edgePaths(layout, weights, scale);
  const streams = circuit.edges.filter((edge) => edge.kind === "stream");
  const named = weights.length <= NAMED_WEIGHTS ? weights : [];
  const labels = named.map((edge) => {
    const { x, y } = edgeMiddle(layout, edge);
    return s("text", { class: "weight-name", x, y: y - 6, "text-anchor": "middle" }, signed(edge.weight, 2));
  });
  const back = s("g", { class: "back-edges" }, ...edgePaths(layout, streams, scale), ...paths, ...labels);
  const front = s("g", { class: "front-edges" });
  const nodes = circuit.nodes.map((_, i) => drawNode(circuit, layout, i));
  const view = s("g", {}, back, front, s("g", { class: "nodes" }, ...nodes));
  const svg = s(
    "svg",
    {
      width: layout.width,
      height: layout.height,
      viewBox: `0 0 ${layout.width} ${layout.height}`,
      role: "group",
      "aria-label":
        `Circuit of ${circuit.task}: ` + `${many(circuit.nodes.length, "node")}, ${many(weights.length, "weight")}`,
    },
    view,
    s(
      "g",
      { class: "column-names" },
      s("rect", { x: 0, y: 0, width: layout.width, height: 50 }),
      ...layout.columns.map((column) =>
        s(
          "text",
          { "text-anchor": "middle" },
          ...column.lines.map((line, i) => s("tspan", { x: column.x, y: 14 + 13 * i }, line)),
        ),
      ),
    ),
  );
  /** @type {Graph} */
  const graph = { circuit, layout, weights, scale, paths, labels, nodes, back, front };
  mountHighlight(graph, hidden);
  mountArrowKeys(graph.nodes, layout);
  const root = /** @type {any} */ (select(svg));
  zoomer
    .translateExtent([
      [-40, -40],
      [layout.width + 40, layout.height + 40],
    ])
    .on("zoom", (/** @type {any} */ event) => view.setAttribute("transform", event.transform));
  root.call(zoomer);
  return { svg, update: thresholdUpdate(graph, streams, hidden) };
}

/**
 * Hide or show the weights between the last threshold and this one, and dim the nodes that are left without edges.
 * @param {Graph} graph
 * @param {CEdge[]} streams
 * @param {() => number} hidden
 */
function thresholdUpdate({ weights, scale, paths, labels, nodes, back }, streams, hidden) {
  const moved = scale.many ? roughly(back) : () => {};
  const degree = new Array(nodes.length).fill(0);
  for (const edge of [...weights, ...streams]) for (const end of [edge.source, edge.target]) degree[end] += 1;
  let now = 0;
  return () => {
    const then = hidden();
    const [from, to] = [Math.min(now, then), Math.max(now, then)];
    const step = then > now ? -1 : 1;
    for (let i = from; i < to; i += 1) {
      for (const end of [weights[i].source, weights[i].target]) degree[end] += step;
    }
    if (now !== then) moved();
    for (const elements of [paths, labels]) showFrom(elements, now, then);
    nodes.forEach((node, i) => node.classList.toggle("lone", degree[i] === 0));
    now = then;
  };
}

/**
 * @param {Circuit} circuit
 * @param {Layout} layout
 * @param {number} i
 */
function drawNode(circuit, layout, i) {
  const node = circuit.nodes[i];
  const { x, y } = layout.nodes[i];
  const most = Math.max(...circuit.nodes.map((one) => one.ablation ?? 0), 1e-9);
  const small = layout.spacing < 40;
  const radius = (small ? 3.5 : 5) + (small ? 3 : 6) * Math.sqrt(Math.max(node.ablation ?? 0, 0) / most);
  const number = node.id.split(".").at(-1) ?? node.id;
  const label = small
    ? s("text", { class: "node-label", x: x + radius + 3, y, dy: "0.35em" }, number)
    : s(
        "text",
        { class: "node-label", x, y: y + radius + 14, "text-anchor": "middle" },
        number,
        ...tokenLines(node.tokens).map((line) => s("tspan", { class: "quiet", x, dy: "1.25em" }, line)),
      );
  return s(
    "a",
    { href: href("channel", node.id), class: "node", tabindex: i === 0 ? 0 : -1, "aria-label": nodeText(circuit, i) },
    s("circle", { cx: x, cy: y, r: radius.toFixed(1) }),
    label,
  );
}

/**
 * A node's tokens under it, in two lines at most.
 * @param {string} tokens
 */
function tokenLines(tokens) {
  const lines = tokens ? wrap(tokens, TOKEN_LINE) : [];
  return lines.length > 2 ? [lines[0], `${lines[1]} …`] : lines;
}

/**
 * @param {Circuit} circuit
 * @param {number} i
 */
function nodeText(circuit, i) {
  return `${circuit.nodes[i].id}, ${describeNode(circuit.nodes[i].id)}`;
}
