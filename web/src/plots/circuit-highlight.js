// The pointer or the focus on a node: its figures, and its edges and neighbours over all others. On an edge: its weight.
import { pointer } from "d3-selection";
import { zoomTransform } from "d3-zoom";
import { signed } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { edgePaths } from "./circuit-edges.js";
import { edgeDistance } from "./circuit-layout.js";

/** @typedef {import("../types.js").Circuit} Circuit */
/** @typedef {import("../types.js").CEdge} CEdge */
/** @typedef {import("./circuit-drawing.js").Graph} Graph */

/** An edge farther from the pointer than this, in CSS pixels, is not meant. */
const REACH = 5;

/**
 * The pointer or the focus on a node shows its figures, and its edges and neighbours over all others.
 * @param {Graph} graph
 * @param {() => number} hidden
 */
export function mountHighlight({ circuit, layout, weights, streams, scale, nodes, front, layers }, hidden) {
  /** @param {number} i */
  function show(i) {
    const near = [...streams, ...weights.slice(hidden())].filter((edge) => edge.source === i || edge.target === i);
    front.replaceChildren(...edgePaths(layout, near, scale));
    layers.classList.add("faded");
    const kept = new Set([i, ...near.flatMap((edge) => [edge.source, edge.target])]);
    nodes.forEach((node, at) => node.classList.toggle("near", kept.has(at)));
    showTip(nodes[i].firstElementChild ?? nodes[i], tipLines(circuit.nodes[i].id, nodeFigures(circuit, i)));
  }
  function clear() {
    front.replaceChildren();
    layers.classList.remove("faded");
    hideTip();
  }
  nodes.forEach((node, i) => {
    node.addEventListener("mouseenter", () => show(i));
    node.addEventListener("focus", () => show(i));
    node.addEventListener("mouseleave", clear);
    node.addEventListener("blur", clear);
  });
}

/**
 * The pointer near an edge shows the edge's weight; a node that stands out goes before.
 * @param {Graph} graph
 * @param {SVGSVGElement} svg
 * @param {() => number} hidden
 */
export function mountEdgeTip({ circuit, layout, weights, scale, front, layers }, svg, hidden) {
  /** @type {CEdge | null} */
  let shown = null;
  /** @param {CEdge | null} edge */
  function mark(edge) {
    if (edge === shown) return;
    shown = edge;
    front.classList.toggle("single", edge !== null);
    front.replaceChildren(...edgePaths(layout, edge ? [edge] : [], scale));
    if (!edge) hideTip();
  }
  svg.addEventListener("mousemove", (event) => {
    if (layers.classList.contains("faded")) {
      shown = null;
      front.classList.remove("single");
      return;
    }
    const { x, k, y } = zoomTransform(svg);
    const [px, py] = pointer(event, svg);
    const edge = event.buttons ? null : nearest(layout, weights, hidden(), (px - x) / k, (py - y) / k, REACH / k);
    mark(edge);
    if (!edge) return;
    const [from, to] = [edge.source, edge.target].map((end) => circuit.nodes[end].id);
    const at = { getBoundingClientRect: () => new DOMRect(event.clientX, event.clientY) };
    showTip(at, tipLines(`${from} → ${to}`, [["weight", signed(edge.weight)]]));
  });
  svg.addEventListener("mouseleave", () => mark(null));
}

/**
 * The shown weight whose line is nearest to a point, if it is within reach; the larger of two that are as near.
 * @param {import("./circuit-layout.js").Layout} layout
 * @param {CEdge[]} weights
 * @param {number} hidden
 * @param {number} x
 * @param {number} y
 * @param {number} reach
 */
function nearest(layout, weights, hidden, x, y, reach) {
  /** @type {CEdge | null} */
  let best = null;
  let least = reach;
  for (let rank = weights.length - 1; rank >= hidden; rank -= 1) {
    const distance = edgeDistance(layout, weights[rank], x, y);
    if (distance < least) [best, least] = [weights[rank], distance];
  }
  return best;
}

/**
 * @param {Circuit} circuit
 * @param {number} i
 * @returns {[string, string][]}
 */
function nodeFigures(circuit, i) {
  const node = circuit.nodes[i];
  const weights = circuit.edges.filter((edge) => edge.kind === "weight");
  /** @type {[string, string][]} */
  const rows = [
    ["mean", signed(node.mean)],
    ["loss when frozen", node.ablation === null ? "not measured" : signed(node.ablation)],
    [
      "weights in, out",
      `${weights.filter((edge) => edge.target === i).length}, ${weights.filter((edge) => edge.source === i).length}`,
    ],
  ];
  return node.tokens ? [...rows, ["tokens", node.tokens]] : rows;
}
