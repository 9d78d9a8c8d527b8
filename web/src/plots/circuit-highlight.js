// The pointer or the focus on a node: its figures, and its edges and neighbours over all others.
import { signed } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { edgePaths } from "./circuit-edges.js";

/** @typedef {import("../types.js").Circuit} Circuit */

/**
 * The pointer or the focus on a node shows its figures, and its edges and neighbours over all others.
 * @param {import("./circuit-graph.js").Graph} graph
 * @param {() => number} hidden
 */
export function mountHighlight({ circuit, layout, weights, scale, nodes, back, front }, hidden) {
  /** @param {number} i */
  function show(i) {
    const streams = circuit.edges.filter((edge) => edge.kind === "stream");
    const near = [...streams, ...weights.slice(hidden())].filter((edge) => edge.source === i || edge.target === i);
    front.replaceChildren(...edgePaths(layout, near, scale));
    back.classList.add("faded");
    const kept = new Set([i, ...near.flatMap((edge) => [edge.source, edge.target])]);
    nodes.forEach((node, at) => node.classList.toggle("near", kept.has(at)));
    showTip(nodes[i].firstElementChild ?? nodes[i], tipLines(circuit.nodes[i].id, nodeFigures(circuit, i)));
  }
  function clear() {
    front.replaceChildren();
    back.classList.remove("faded");
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
