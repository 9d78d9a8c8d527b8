// All channels in a table.
import { h } from "../dom.js";
import { num, percent, signed } from "../format.js";
import { noChannels } from "../hints.js";
import { href } from "../router.js";
import { sortable } from "../sortable.js";
import { breakable, chip, figure, heading } from "../ui.js";

/** @typedef {import("../types.js").Channel} Channel */

/** @param {import("../types.js").PageData} page */
export function channelsView({ channels }) {
  const title = heading(
    "Channels",
    "What nodes of the sparse model do",
    "The nodes that circuits and edits name, on text: how often each is active, and the tokens at " +
      "which it is most positive and most negative.",
  );
  const rows = Object.values(channels);
  if (rows.length === 0) return [title, noChannels()];
  const tokens = (/** @type {import("../types.js").Context[]} */ contexts) =>
    [...new Set(contexts.map((one) => one.tokens[one.at]))].slice(0, 3).map(chip);
  const { element } = sortable({
    caption: "Channels. Press a column’s name to sort by it, a row to open the channel.",
    rows,
    link: (one) => href("channel", one.node),
    columns: [
      {
        label: "node",
        text: true,
        value: (one) => one.node,
        cell: (one) => h("a", { href: href("channel", one.node) }, ...breakable(one.node)),
      },
      { label: "active", value: (one) => one.density, cell: (one) => percent(one.density) },
      { label: "mean", value: (one) => one.mean, cell: (one) => signed(one.mean) },
      {
        label: "most positive at",
        text: true,
        value: (one) => one.positive[0]?.value,
        cell: (one) => tokens(one.positive),
      },
      {
        label: "most negative at",
        text: true,
        value: (one) => one.negative[0]?.value,
        cell: (one) => tokens(one.negative),
      },
      {
        label: "KL, dense model",
        note: "random",
        value: (one) => one.dense?.kl,
        cell: (one) => one.dense && figure(num(one.dense.kl, 2), num(one.dense.kl_random, 2)),
      },
    ],
  });
  return [title, element];
}
