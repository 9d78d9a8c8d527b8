// The edges of a circuit as few paths, of which a threshold hides the smallest weights.
import { s } from "../dom.js";
import { edgePath } from "./circuit-layout.js";

/** @typedef {import("../types.js").CEdge} CEdge */
/** @typedef {import("./circuit-layout.js").Layout} Layout */
/** @typedef {{largest: number, many: boolean}} Scale of the line widths; many: there are more than MANY weights */

/**
 * Weights of one sign and nearly one size, drawn as one path.
 * @typedef {object} Run
 * @property {SVGPathElement} path
 * @property {number[]} ranks of its weights, by growing size
 * @property {string[]} pieces of the path, one for each weight
 * @property {number} width of the line, in CSS pixels
 * @property {number} first index of the first piece that is shown
 * @property {number} drawn index of the first piece that the path has
 */

/** Line widths, smallest to largest; of many edges thin ones, which cover less of each other. */
const [FEW_WIDTHS, MANY_WIDTHS] = [
  [0.8, 6],
  [0.4, 2],
];
/** So many lines can be told apart by their dashes, and drawn with them within a frame. */
export const MANY = 600;
/** A run is no longer than this, so that cutting it is fast, and its widths differ by less than can be seen. */
const [RUN_LENGTH, RUN_WIDTHS] = [64, 0.05];

/**
 * @param {CEdge} edge
 * @param {Scale} scale
 */
function lineWidth(edge, { largest, many }) {
  const [least, most] = many ? MANY_WIDTHS : FEW_WIDTHS;
  return least + (most - least) * (Math.abs(edge.weight) / largest);
}

/** @param {CEdge} edge */
function lineClass(edge) {
  return `edge ${edge.kind === "stream" ? "stream" : edge.weight < 0 ? "negative" : "positive"}`;
}

/**
 * A path for each edge.
 * @param {Layout} layout
 * @param {CEdge[]} edges
 * @param {Scale} scale
 */
export function edgePaths(layout, edges, scale) {
  return edges.map((edge) => {
    const width = edge.kind === "stream" ? null : lineWidth(edge, scale).toFixed(2);
    return s("path", { class: lineClass(edge), d: edgePath(layout, edge), "stroke-width": width });
  });
}

/**
 * Weights as runs, the largest last; one run for each weight unless there are many.
 * @param {Layout} layout
 * @param {CEdge[]} weights by growing size
 * @param {Scale} scale
 */
export function edgeRuns(layout, weights, scale) {
  const most = scale.many ? RUN_LENGTH : 1;
  /** @type {Run[]} */
  const runs = [];
  /** The run of either sign that is being filled. @type {Record<string, Run>} */
  const open = {};
  weights.forEach((edge, rank) => {
    const [sign, width] = [lineClass(edge), lineWidth(edge, scale)];
    let run = open[sign];
    if (!run || run.pieces.length === most || width - run.width > RUN_WIDTHS) {
      const path = s("path", { class: sign, "stroke-width": width.toFixed(2) });
      run = open[sign] = { path, ranks: [], pieces: [], width, first: 0, drawn: 0 };
      runs.push(run);
    }
    run.ranks.push(rank);
    run.pieces.push(edgePath(layout, edge));
  });
  for (const run of runs) run.path.setAttribute("d", run.pieces.join(""));
  return runs;
}

/**
 * Hide the smallest weights. Only paths of which another part is seen than before are touched.
 * @param {Run[]} runs
 * @param {number} hidden how many weights are hidden
 */
export function showFrom(runs, hidden) {
  for (const run of runs) {
    const first = firstFrom(run.ranks, hidden);
    if (first === run.first) continue;
    run.first = first;
    if (first === run.pieces.length) {
      run.path.setAttribute("visibility", "hidden");
      continue;
    }
    run.path.removeAttribute("visibility");
    if (first !== run.drawn) run.path.setAttribute("d", run.pieces.slice(first).join(""));
    run.drawn = first;
  }
}

/**
 * Index of the first of these ascending numbers that is at least `least`.
 * @param {number[]} numbers
 * @param {number} least
 */
export function firstFrom(numbers, least) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < least) low = middle + 1;
    else high = middle;
  }
  return low;
}
