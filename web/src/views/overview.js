// The two models, their bridge, the best steering result, and how to read the rest.
import { bestSweep, turnsBoth, valueAt } from "../curves.js";
import { h } from "../dom.js";
import { agreementStat, bothModels, editName } from "../edits.js";
import { channelsOf, count, many, num } from "../format.js";
import { noBridges, noHeadline } from "../hints.js";
import { dosePlot } from "../plots/dose.js";
import { modelPicture } from "../plots/models.js";
import { href } from "../router.js";
import { breakable, heading, promptCount, quiet, section, SOLVED, stat, stats } from "../ui.js";

/** @typedef {import("../types.js").PageData} PageData */

/** @param {PageData} page */
export function overview(page) {
  return [
    heading(
      "Report",
      page.title,
      "Linear maps, the bridges, join the residual streams of a dense language model and of a " +
        "weight-sparse one that a person can read. ",
      "What is edited in a channel of the sparse model is decoded into the dense one.",
    ),
    summary(page),
    section(
      "Two models, and a bridge at every site",
      [
        "A bridge’s line spans as much of the gap as it explains of the variance (1 − NMSE): ",
        h("span", { class: "key dense" }, "encoding, down"),
        " and ",
        h("span", { class: "key sparse" }, "decoding, up"),
        ". A short bar across the first marks the most that an encoder can reach.",
      ],
      page.bridges.sites.length ? modelPicture(page) : noBridges(),
      page.bridges.sites.length > 0 &&
        h("p", { class: "more-link" }, h("a", { href: href("bridges") }, "All figures per site")),
    ),
    headline(page),
    reading(page),
  ];
}

/** @param {PageData} page */
function summary({ bridges, tasks, circuits }) {
  const { mean } = bridges;
  const solved = (/** @type {"dense" | "sparse"} */ side) =>
    tasks.filter((task) => (task.solved[side] ?? 0) >= SOLVED).length;
  const edges = Object.values(circuits)
    .map((circuit) => circuit.edges.filter((edge) => edge.kind === "weight").length)
    .sort((a, b) => a - b);
  const middle = edges.length ? (edges[(edges.length - 1) >> 1] + edges[edges.length >> 1]) / 2 : null;
  return stats(
    bridges.sites.length > 0 &&
      stat(
        "KL dense → sparse",
        num(mean.kl_dense_to_sparse),
        `mean ablation ${num(mean.kl_dense_to_sparse_mean_ablation, 2)}`,
      ),
    bridges.sites.length > 0 &&
      stat(
        "KL sparse → dense",
        num(mean.kl_sparse_to_dense),
        `mean ablation ${num(mean.kl_sparse_to_dense_mean_ablation, 2)}`,
      ),
    bridges.sites.length > 0 &&
      stat("NMSE, decoder", num(mean.nmse_decode), `shuffled tokens ${num(mean.nmse_decode_shuffled, 2)}`),
    tasks.length > 0 &&
      stat(
        "tasks solved, dense",
        `${solved("dense")} of ${tasks.length}`,
        `sparse model ${solved("sparse")}; 90% of ${promptCount(tasks)} prompts`,
      ),
    edges.length > 0 && stat("circuits", String(edges.length), `median ${middle} weights`),
  );
}

/** @param {PageData} page */
function headline(page) {
  const task = page.tasks.find((one) => one.name === page.headline);
  const sweep = task && bestSweep(task);
  if (!task || !sweep) return section("Editing the sparse model", null, noHeadline());
  const what = editName(sweep);
  const edited = page.tasks.filter(bestSweep).length;
  return section(
    turnsBoth(sweep) ? `${capital(what)} ${channelsOf(sweep).length > 1 ? "turn" : "turns"} both models` : `Editing ${what}`,
    [
      edited > 1 && `The best of the ${edited} tasks that edits were measured on: `,
      edited > 1 ? "" : "Task ",
      h("a", { href: href("task", task.name) }, ...breakable(task.name)),
      `: ${what} set to what the counterfactual prompt gives, and the change pushed through the bridge. `,
      "P(target) is the probability of the counterfactual’s answer: over a half, the model gives the other answer.",
    ],
    stats(
      ...bothModels(sweep, `${count(sweep.prompts)} held-out prompts`),
      stat("dense mean difference", num(valueAt(sweep, "p_target_mean_difference")), "dense model’s own direction"),
      agreementStat(sweep),
    ),
    dosePlot(sweep, what),
  );
}

/** @param {string} text */
function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/** @param {PageData} page */
function reading({ bridges, tasks, circuits, channels }) {
  const entry = (
    /** @type {string} */ view,
    /** @type {string} */ name,
    /** @type {string} */ text,
    /** @type {string} */ size,
  ) => h("div", {}, h("dt", {}, h("a", { href: href(view) }, name), " ", quiet(size)), h("dd", {}, text));
  return [
    section(
      "How to read the rest",
      null,
      h(
        "dl",
        { class: "guide" },
        entry(
          "bridges",
          "Bridges",
          "How well each site’s bridge reconstructs and predicts, beside the floor and the control of every figure.",
          many(bridges.sites.length, "site"),
        ),
        entry(
          "tasks",
          "Tasks",
          "Pairs of prompts that differ in a cue: which model solves them, what an edit does to " +
            "both, and its side effects.",
          many(tasks.length, "task"),
        ),
        entry(
          "circuit",
          "Circuits",
          "The few nodes of the sparse model that still do a task when every other node is frozen at its mean.",
          many(Object.keys(circuits).length, "circuit"),
        ),
        entry(
          "channel",
          "Channels",
          "What a node does on text, most positive beside most negative, and what it is in the dense model.",
          many(Object.keys(channels).length, "channel"),
        ),
      ),
    ),
    section(
      "Terms",
      null,
      h("dl", { class: "terms" }, ...TERMS.map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text)))),
    ),
    bridges.sites.length > 0 &&
      h(
        "p",
        { class: "quiet" },
        `Measured on ${count(bridges.tokens)} held-out tokens. Cross-entropy: ` +
          `dense ${num(bridges.dense_ce)}, sparse ${num(bridges.sparse_ce)} nats; ` +
          `KL of the sparse model alone ${num(bridges.kl_sparse_alone)}.`,
      ),
  ];
}

const TERMS = [
  ["Site", "A point of the residual stream: before an attention (0.attn), an MLP (0.mlp), or the final norm (final)."],
  [
    "Bridge",
    "At a site, an encoder from the dense stream to the sparse one, which keeps the k largest " +
      "entries (AbsTopK), and a decoder back.",
  ],
  [
    "NMSE",
    "Squared error over variance: 0 is perfect, 1 is what predicting the mean gives. The floor is " +
      "what AbsTopK alone costs.",
  ],
  [
    "KL",
    "Of a pass that starts in one model and ends in the other, from the dense model’s own " +
      "prediction, in nats per token. The control puts the stream’s mean in its place.",
  ],
  [
    "Channel, node",
    "A channel is a coordinate of the residual stream. A node is a channel as a sublayer reads or " +
      "writes it, a neuron, or a coordinate of a query, key or value.",
  ],
  ["P(target)", "The probability, after the original prompt, of the answer to the counterfactual prompt."],
  [
    "Strength",
    "How much of the way an edit goes: 0 leaves the model as it is, 1 sets what the counterfactual prompt gives.",
  ],
  ["Control", "In a quieter tone beside a figure: what the same measurement gives where there is nothing to find."],
];
