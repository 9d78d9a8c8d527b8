// The figures of an edit, which the overview and a task's view show alike.
import { valueAt } from "./curves.js";
import { channelsOf, num } from "./format.js";
import { stat } from "./ui.js";

/** @typedef {import("./types.js").Sweep} Sweep */

/**
 * What a sweep edits, in words.
 * @param {Sweep} sweep
 */
export function editName(sweep) {
  const channels = channelsOf(sweep);
  return `${channels.length === 1 ? `channel ${channels[0]}` : `channels ${channels.join(", ")}`} at ${sweep.site}`;
}

/**
 * P(target) of both models before and after an edit.
 * @param {Sweep} sweep
 * @param {string} [note] in a quieter tone under the sparse model's
 */
export function bothModels(sweep, note) {
  return [
    stat(
      "dense model, P(target)",
      `${num(valueAt(sweep, "p_target", 0))} → ${num(valueAt(sweep, "p_target"))}`,
      `random directions ${num(valueAt(sweep, "p_target_random_direction"))}`,
    ),
    stat(
      "sparse model, same edit",
      `${num(valueAt(sweep, "p_target_sparse_model", 0))} → ${num(valueAt(sweep, "p_target_sparse_model"))}`,
      note,
    ),
  ];
}

/**
 * How far both models' answers move together; null where it was not measured.
 * @param {Sweep} sweep
 */
export function agreementStat({ agreement }) {
  if (!agreement) return null;
  const { r_squared: same, r_squared_shuffled: other } = agreement;
  return stat(
    "agreement of both models, R²",
    num(same, 2),
    other === null ? "no other channels" : `other channels ${num(other, 2)}`,
  );
}
