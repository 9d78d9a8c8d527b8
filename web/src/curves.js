// The curves of a sweep: labels and how they are drawn. The edit in both models has the colours; baselines are quiet.

/**
 * @typedef {object} Curve
 * @property {import("./types.js").CurveName} name
 * @property {string} label
 * @property {string} style class of its line
 */

/** @type {Curve[]} */
export const CURVES = [
  { name: "p_target", label: "dense model: the edit, through the bridge", style: "dense" },
  { name: "p_target_sparse_model", label: "sparse model: the same edit", style: "sparse" },
  { name: "p_target_random_direction", label: "random directions of the same norm", style: "base-1" },
  {
    name: "p_target_mean_difference_equal_norm",
    label: "dense mean difference at the edit’s site, same norm",
    style: "base-2",
  },
  { name: "p_target_probe", label: "a linear probe at the edit’s site, same norm", style: "base-3" },
  { name: "p_target_mean_difference", label: "dense mean difference, at its best site and norm", style: "base-4" },
  { name: "p_target_all_channels", label: "all channels through the bridge", style: "base-5" },
];

/**
 * The curves that a sweep has.
 * @param {import("./types.js").Sweep} sweep
 */
export function curvesOf(sweep) {
  return CURVES.filter(({ name }) => Array.isArray(sweep[name]));
}

/**
 * P(target) of a curve at a strength, 1 if none is given; null where it was not measured at that strength.
 * @param {import("./types.js").Sweep} sweep
 * @param {import("./types.js").CurveName} name
 * @param {number} [strength]
 */
export function valueAt(sweep, name, strength = 1) {
  return sweep[name]?.[sweep.strengths.indexOf(strength)] ?? null;
}

/**
 * The sweep that tables speak of: of one channel where it turns both models, else of a few if there is one.
 * @param {import("./types.js").Task} task
 */
export function bestSweep({ steering: { one, few } }) {
  return one && turnsBoth(one) ? one : (few ?? one);
}

/**
 * Whether an edit of strength 1 makes the other answer the likelier one in both models.
 * @param {import("./types.js").Sweep} sweep
 */
export function turnsBoth(sweep) {
  return Math.min(valueAt(sweep, "p_target") ?? 0, valueAt(sweep, "p_target_sparse_model") ?? 0) > 0.5;
}
