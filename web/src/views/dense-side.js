// What a channel is in the dense model: its column there, and what adding it does.
import { h } from "../dom.js";
import { count, num, signed } from "../format.js";
import { barList, chip, missing, stat, stats } from "../ui.js";

/** @param {import("../types.js").Channel} channel */
export function denseSide({ dense, no_dense_side: why, decoder_column: column, node }) {
  if (!dense)
    return [
      missing(
        why ? `Not known: ${why}.` : "Only reads and writes of a bridged stream have a column in the dense model.",
      ),
    ];
  const list = (/** @type {string} */ title, /** @type {[string, number][]} */ changes) =>
    changes.length
      ? barList(
          title,
          changes.map(([token, change]) => ({ name: chip(token), value: change, text: signed(change, 2) })),
        )
      : h("p", { class: "quiet" }, `${title}: none.`);
  return [
    h(
      "p",
      { class: "lead" },
      `Through the bridge of ${dense.site}, at the dense model’s ${dense.dense_site}. The channel’s column times ` +
        `${num(dense.added, 2)}, the 99th percentile of its size, is added at each of ${count(dense.tokens)} tokens.`,
    ),
    stats(
      stat("KL of the addition", num(dense.kl), `random directions of that norm ${num(dense.kl_random)}`),
      dense.task !== null &&
        stat(
          "cosine with the mean difference",
          signed(dense.mean_difference, 2),
          `dense model’s own, task ${dense.task}`,
        ),
    ),
    h(
      "div",
      { class: "columns" },
      list("Logits raised most", dense.raised),
      list("Logits lowered most", dense.lowered),
    ),
    h(
      "div",
      { class: "columns" },
      column && column.length
        ? barList(
            "Largest entries of the decoder’s column, by channel of the dense stream",
            column.map(([index, weight]) => ({
              name: `${dense.dense_site} ${index}`,
              value: weight,
              text: signed(weight),
            })),
            16,
          )
        : missing(`The page holds no column of the decoder for ${node}.`),
    ),
  ];
}
