// The edges of a circuit as paths, and which of them a threshold hides.
import { s } from "../dom.js";
import { edgePath } from "./circuit-layout.js";

/** @typedef {import("../types.js").CEdge} CEdge */
/** @typedef {import("./circuit-layout.js").Layout} Layout */

/** Line widths, smallest to largest; of many edges thin ones, which cover less of each other. */
const [FEW_WIDTHS, MANY_WIDTHS] = [
  [0.8, 6],
  [0.4, 2],
];
export const MANY = 600;
const SETTLED = 180;

/**
 * A path for each edge.
 * @param {Layout} layout
 * @param {CEdge[]} edges
 * @param {{largest: number, many: boolean}} scale of their widths
 */
export function edgePaths(layout, edges, { largest, many }) {
  const [least, most] = many ? MANY_WIDTHS : FEW_WIDTHS;
  return edges.map((edge) => {
    const sign = edge.kind === "stream" ? "stream" : edge.weight < 0 ? "negative" : "positive";
    const width =
      edge.kind === "stream" ? null : (least + (most - least) * (Math.abs(edge.weight) / largest)).toFixed(2);
    return s("path", { class: `edge ${sign}`, d: edgePath(layout, edge), "stroke-width": width });
  });
}

/**
 * Hide elements before an index and show the others, where that has changed.
 * @param {Element[]} elements
 * @param {number} before the index last time
 * @param {number} now
 */
export function showFrom(elements, before, now) {
  for (const element of elements.slice(Math.min(before, now), Math.max(before, now))) {
    if (now > before) element.setAttribute("visibility", "hidden");
    else element.removeAttribute("visibility");
  }
}

/**
 * Draw thousands of edges fast while a threshold moves: without dashes, which come back when it rests.
 * @param {Element} group
 */
export function roughly(group) {
  let timer = 0;
  return () => {
    group.classList.add("moving");
    clearTimeout(timer);
    timer = setTimeout(() => group.classList.remove("moving"), SETTLED);
  };
}
