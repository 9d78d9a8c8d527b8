// The weights of a circuit in bands by size, each in a layer of its own: a threshold draws one band anew, and moves
// those with smaller weights out of sight, where the browser keeps them drawn.
import { s } from "../dom.js";
import { edgeRuns, MANY, showFrom } from "./circuit-edges.js";

/** @typedef {import("../types.js").CEdge} CEdge */

/**
 * @typedef {object} Band
 * @property {number} from rank of its first weight
 * @property {number} to one more than the rank of its last
 * @property {boolean} crowd whether its weights are beyond the largest MANY
 * @property {import("./circuit-edges.js").Run[]} runs
 * @property {SVGGElement} group of its paths
 * @property {SVGSVGElement} svg
 * @property {number} hidden how many of its weights are
 */

/** Bands of the weights beyond the largest MANY, and of those; more are drawn anew faster and take more memory. */
const [CROWD_BANDS, TOP_BANDS] = [2, 3];

/**
 * Bands of the largest MANY weights, and, if there are more, of the others.
 * @param {import("./circuit-layout.js").Layout} layout
 * @param {CEdge[]} weights by growing size
 * @param {import("./circuit-edges.js").Scale} scale
 * @returns {Band[]}
 */
export function edgeBands(layout, weights, scale) {
  const { width, height } = layout;
  const crowd = Math.max(weights.length - MANY, 0);
  const starts = crowd ? [...split(0, crowd, CROWD_BANDS), ...split(crowd, weights.length, TOP_BANDS)] : [0];
  return [...new Set(starts)].map((from, i, all) => {
    const to = all[i + 1] ?? weights.length;
    const runs = edgeRuns(layout, weights.slice(from, to), scale);
    const group = s("g", { class: crowd ? "back-edges solid" : "back-edges" }, ...runs.map((run) => run.path));
    const layer = from < crowd ? "under crowd" : "under";
    const attributes = { width, height, viewBox: `0 0 ${width} ${height}`, class: layer, "aria-hidden": "true" };
    return { from, to, crowd: from < crowd, runs, group, svg: s("svg", attributes, group), hidden: 0 };
  });
}

/**
 * Where each of so many equal parts begins.
 * @param {number} from
 * @param {number} to
 * @param {number} parts
 */
function split(from, to, parts) {
  return Array.from({ length: parts }, (_, i) => from + Math.round(((to - from) * i) / parts));
}

/**
 * Hide the smallest weights. With more than MANY left none is dashed: dashes are told apart no longer, and are slow.
 * @param {Band[]} bands
 * @param {number} hidden how many weights are hidden
 */
export function showBands(bands, hidden) {
  const crowded = bands.some((band) => band.crowd && hidden < band.to);
  bands.forEach((band, i) => {
    // A band out of sight has all its weights, none dashed, so that it can come back as it is.
    const off = i < bands.length - 1 && hidden >= band.to;
    band.svg.classList.toggle("off", off);
    band.group.classList.toggle("solid", crowded || band.crowd || off);
    const now = off ? 0 : Math.min(Math.max(hidden, band.from), band.to) - band.from;
    if (now !== band.hidden) showFrom(band.runs, now);
    band.hidden = now;
  });
}
