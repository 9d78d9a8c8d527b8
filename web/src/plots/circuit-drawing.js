// The picture of a circuit: edges in one layer, nodes and names in another over it, so that either is drawn anew alone.
import { select } from "d3-selection";
import { h, s } from "../dom.js";
import { describeNode, many, signed } from "../format.js";
import { href } from "../router.js";
import { edgeBands, showBands } from "./circuit-bands.js";
import { edgePaths, MANY } from "./circuit-edges.js";
import { mountEdgeTip, mountHighlight } from "./circuit-highlight.js";
import { mountArrowKeys } from "./circuit-keys.js";
import { circuitLayout, edgeMiddle, wrap } from "./circuit-layout.js";

/** @typedef {import("../types.js").Circuit} Circuit */
/** @typedef {import("../types.js").CEdge} CEdge */
/** @typedef {import("./circuit-layout.js").Layout} Layout */

/**
 * @typedef {object} Graph what is drawn
 * @property {Circuit} circuit
 * @property {Layout} layout
 * @property {CEdge[]} weights by growing size, so that those under a threshold come first
 * @property {CEdge[]} streams writes that are read again
 * @property {import("./circuit-edges.js").Scale} scale of the edges' widths
 * @property {import("./circuit-bands.js").Band[]} bands of the weights
 * @property {SVGElement[]} labels of the weights; none if there are many
 * @property {SVGAElement[]} nodes
 * @property {SVGGElement} front edges that stand out
 * @property {HTMLElement} layers what holds all; it is marked while a node's neighbours stand out
 */

const NAMED_WEIGHTS = 16;
const TOKEN_LINE = 15;

/**
 * @param {Circuit} circuit
 * @param {CEdge[]} weights by growing size
 * @param {number} width
 * @param {() => number} hidden how many of the weights are
 * @param {any} zoomer
 */
export function drawGraph(circuit, weights, width, hidden, zoomer) {
  const graph = makeGraph(circuit, weights, width);
  const { layout, bands, front, labels, nodes, layers } = graph;
  const over = s("g", {}, s("g", { class: "weight-names" }, ...labels), front, s("g", { class: "nodes" }, ...nodes));
  const top = s(
    "svg",
    {
      width: layout.width,
      height: layout.height,
      viewBox: `0 0 ${layout.width} ${layout.height}`,
      role: "group",
      "aria-label":
        `Circuit of ${circuit.task}: ` + `${many(circuit.nodes.length, "node")}, ${many(weights.length, "weight")}`,
    },
    over,
    columnNames(layout),
  );
  layers.append(...bands.map((band) => band.svg), top);
  mountHighlight(graph, hidden);
  mountEdgeTip(graph, top, hidden);
  mountArrowKeys(nodes, layout);
  zoomer
    .translateExtent([
      [-40, -40],
      [layout.width + 40, layout.height + 40],
    ])
    .on("zoom", (/** @type {any} */ event) =>
      [over, ...bands.map((band) => band.group)].forEach((group) => group.setAttribute("transform", event.transform)),
    );
  /** @type {any} */ (select(top)).call(zoomer);
  return { element: layers, svg: top, update: thresholdUpdate(graph, hidden) };
}

/**
 * @param {Circuit} circuit
 * @param {CEdge[]} weights
 * @param {number} width
 * @returns {Graph}
 */
function makeGraph(circuit, weights, width) {
  const layout = circuitLayout(circuit, width);
  const scale = { largest: Math.abs(weights.at(-1)?.weight ?? 0) || 1, many: weights.length > MANY };
  const bands = edgeBands(layout, weights, scale);
  const streams = circuit.edges.filter((edge) => edge.kind === "stream");
  const named = weights.length <= NAMED_WEIGHTS ? weights : [];
  const labels = named.map((edge) => {
    const { x, y } = edgeMiddle(layout, edge);
    return s("text", { class: "weight-name", x, y: y - 6, "text-anchor": "middle" }, signed(edge.weight, 2));
  });
  const most = Math.max(...circuit.nodes.map((node) => node.ablation ?? 0), 1e-9);
  const nodes = circuit.nodes.map((_, i) => drawNode(circuit, layout, i, most));
  bands[bands.length - 1].group.prepend(...edgePaths(layout, streams, scale));
  const front = s("g", { class: "front-edges" });
  const layers = h("div", { class: "layers" });
  return { circuit, layout, weights, streams, scale, bands, labels, nodes, front, layers };
}

/** @param {Layout} layout */
function columnNames({ width, columns }) {
  const name = (/** @type {Layout["columns"][0]} */ { x, lines }) =>
    s("text", { "text-anchor": "middle" }, ...lines.map((line, i) => s("tspan", { x, y: 14 + 13 * i }, line)));
  return s("g", { class: "column-names" }, s("rect", { x: 0, y: 0, width, height: 50 }), ...columns.map(name));
}

/**
 * Hide or show the weights between the last threshold and this one, and dim the nodes that are left without edges.
 * What is seen depends on the threshold alone, not on those before it.
 * @param {Graph} graph
 * @param {() => number} hidden
 */
function thresholdUpdate({ weights, streams, bands, labels, nodes }, hidden) {
  const degree = new Array(nodes.length).fill(0);
  for (const edge of [...weights, ...streams]) for (const end of [edge.source, edge.target]) degree[end] += 1;
  nodes.forEach((node, i) => node.classList.toggle("lone", degree[i] === 0));
  let now = 0;
  return () => {
    const then = hidden();
    /** @type {Set<number>} */
    const ends = new Set();
    for (const edge of weights.slice(Math.min(now, then), Math.max(now, then))) {
      for (const end of [edge.source, edge.target]) {
        degree[end] += then > now ? -1 : 1;
        ends.add(end);
      }
    }
    showBands(bands, then);
    labels.forEach((label, i) => label.classList.toggle("gone", i < then));
    for (const i of ends) nodes[i].classList.toggle("lone", degree[i] === 0);
    now = then;
  };
}

/**
 * @param {Circuit} circuit
 * @param {Layout} layout
 * @param {number} i
 * @param {number} most largest change of the loss by one node
 */
function drawNode(circuit, layout, i, most) {
  const node = circuit.nodes[i];
  const { x, y } = layout.nodes[i];
  const small = layout.spacing < 40;
  const radius = (small ? 3.5 : 5) + (small ? 3 : 6) * Math.sqrt(Math.max(node.ablation ?? 0, 0) / most);
  const number = node.id.split(".").at(-1) ?? node.id;
  const label = small
    ? s("text", { class: "node-label", x: x + radius + 3, y, dy: "0.35em" }, number)
    : s(
        "text",
        { class: "node-label", x, y: y + radius + 14, "text-anchor": "middle" },
        number,
        ...tokenLines(node.tokens).map((line) => s("tspan", { class: "tokens", x, dy: "1.3em" }, line)),
      );
  return s(
    "a",
    {
      href: href("channel", node.id),
      class: "node",
      tabindex: i === 0 ? 0 : -1,
      "aria-label": `${node.id}, ${describeNode(node.id)}`,
    },
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
