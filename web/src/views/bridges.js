// Quality per site with floors and controls: plots, and a table that can be sorted.
import { h } from "../dom.js";
import { count, num } from "../format.js";
import { noBridges } from "../hints.js";
import { sitePanel } from "../plots/sites.js";
import { sortable } from "../sortable.js";
import { figure, heading, section, stat, stats } from "../ui.js";

/** @typedef {import("../types.js").Site} Site */
/** @typedef {keyof Site} Key */

/**
 * Label, figure, name of its control, control, standard error.
 * @type {[string, Key, string, Key | null, Key | null][]}
 */
const COLUMNS = [
  ["NMSE encode", "nmse_encode", "floor", "nmse_encode_floor", null],
  ["NMSE decode", "nmse_decode", "shuffled", "nmse_decode_shuffled", null],
  [
    "KL dense → sparse",
    "kl_dense_to_sparse",
    "mean ablation",
    "kl_dense_to_sparse_mean_ablation",
    "kl_dense_to_sparse_se",
  ],
  [
    "KL sparse → dense",
    "kl_sparse_to_dense",
    "mean ablation",
    "kl_sparse_to_dense_mean_ablation",
    "kl_sparse_to_dense_se",
  ],
  ["CE recovered", "ce_recovered_dense_to_sparse", "to sparse", null, null],
  ["CE recovered", "ce_recovered_sparse_to_dense", "to dense", null, null],
];

/** @param {import("../types.js").PageData} page */
export function bridgesView({ bridges }) {
  const title = heading(
    "Bridges",
    "How well the bridges reconstruct and predict",
    "Held-out figures per site. Beside each, in a quieter tone, its control: what AbsTopK alone " +
      "costs (floor), a decoder on other tokens’ streams (shuffled), a stream at its mean (mean " +
      "ablation).",
  );
  if (bridges.sites.length === 0) return [title, noBridges()];
  return [
    title,
    stats(
      stat(
        "tokens measured on",
        count(bridges.tokens),
        bridges.nmse_tokens ? `NMSE: ${count(bridges.nmse_tokens)}` : "",
      ),
      stat("cross-entropy, dense", num(bridges.dense_ce), `sparse model ${num(bridges.sparse_ce)}`),
      stat("KL, sparse model alone", num(bridges.kl_sparse_alone), "nats per token from the dense one"),
    ),
    ...plotsAndTable(bridges),
  ];
}

/** @param {import("../types.js").Bridges} bridges */
function plotsAndTable(bridges) {
  const { sites, mean } = bridges;
  const over = (/** @type {Site | null} */ site) => {
    for (const panel of panels) panel.highlight(site);
    for (const one of sites) rowOf(one)?.classList.toggle("on", one === site);
  };
  const panels = panelsOf(bridges).map((panel) => sitePanel(panel, sites, over));
  const average = /** @type {Site} */ ({ ...mean, name: "mean" });
  const { element, rowOf } = sortable({
    caption: "Figures per site. Press a column’s name to sort by it.",
    columns: [
      { label: "site", text: true, value: (site) => sites.indexOf(site), cell: (site) => site.name },
      ...COLUMNS.map(([label, key, note, control, error]) => ({
        label,
        note,
        value: (/** @type {Site} */ site) => /** @type {number | null} */ (site[key]),
        cell: (/** @type {Site} */ site) => cell(site, key, control, error),
      })),
      {
        label: "dense",
        note: "site",
        text: true,
        value: (site) => site.dense_site ?? "",
        cell: (site) => site.dense_site,
      },
      {
        label: "widths",
        note: "k",
        value: (site) => site.d_sparse,
        cell: (site) =>
          site.d_sparse ? figure(`${count(site.d_dense)} → ${count(site.d_sparse)}`, count(site.k)) : "",
      },
      {
        label: "massive",
        note: "tokens",
        value: (site) => site.massive_share,
        cell: (site) => (typeof site.massive_share === "number" ? `${num(100 * site.massive_share, 2)}%` : "–"),
      },
    ],
    rows: sites,
    last: [average],
    over,
  });
  return [
    section("Per site", null, h("div", { class: "panels" }, ...panels.map((panel) => panel.element))),
    section("Table", null, element),
  ];
}

/**
 * @param {Site} site
 * @param {Key} key
 * @param {Key | null} control
 * @param {Key | null} error
 */
function cell(site, key, control, error) {
  const value = /** @type {number | null} */ (site[key]);
  const beside = control && /** @type {number | null} */ (site[control]);
  const spread = error && /** @type {number | null | undefined} */ (site[error]);
  return [
    figure(num(value), typeof beside === "number" ? num(beside) : ""),
    typeof spread === "number" && h("span", { class: "quiet spread" }, `± ${num(spread)}`),
  ];
}

/**
 * @param {import("../types.js").Bridges} bridges
 * @returns {import("../plots/sites.js").Panel[]}
 */
function panelsOf(bridges) {
  return [
    {
      title: "Reconstruction",
      unit: "NMSE, smaller is better",
      rule: { value: 1, label: "predicting the mean" },
      series: [
        { label: "encode", style: "dense", key: "nmse_encode", control: "nmse_encode_floor", controlLabel: "floor" },
        {
          label: "decode",
          style: "sparse",
          key: "nmse_decode",
          control: "nmse_decode_shuffled",
          controlLabel: "shuffled",
        },
      ],
    },
    {
      title: "Passes that change models",
      unit: "KL, nats per token",
      log: true,
      rule: { value: bridges.kl_sparse_alone, label: "sparse model alone" },
      series: [
        {
          label: "dense → sparse",
          style: "dense",
          key: "kl_dense_to_sparse",
          control: "kl_dense_to_sparse_mean_ablation",
          controlLabel: "mean ablation",
          error: "kl_dense_to_sparse_se",
        },
        {
          label: "sparse → dense",
          style: "sparse",
          key: "kl_sparse_to_dense",
          control: "kl_sparse_to_dense_mean_ablation",
          controlLabel: "mean ablation",
          error: "kl_sparse_to_dense_se",
        },
      ],
    },
    {
      title: "Cross-entropy recovered",
      unit: "1: as the model alone, 0: as mean ablation",
      series: [
        { label: "dense → sparse", style: "dense", key: "ce_recovered_dense_to_sparse" },
        { label: "sparse → dense", style: "sparse", key: "ce_recovered_sparse_to_dense" },
      ],
    },
  ];
}
