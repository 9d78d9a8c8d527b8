// One channel: its contexts of both signs, its values, its weights, and what it is in the dense model.
import { contextList, contextScale } from "../contexts.js";
import { h } from "../dom.js";
import { allNodes, circuitsOf } from "../data.js";
import { count, describeNode, num, percent, signed } from "../format.js";
import { noChannel } from "../hints.js";
import { histogramPlot } from "../plots/histogram.js";
import { href } from "../router.js";
import {
  barList,
  breakable,
  chip,
  choice,
  heading,
  missing,
  nodeName,
  plainTable,
  scroller,
  section,
  stat,
  stats,
  tableView,
} from "../ui.js";
import { denseSide } from "./dense-side.js";

/** @typedef {import("../types.js").PageData} PageData */
/** @typedef {import("../types.js").Channel} Channel */
/** @typedef {import("../types.js").Context} Context */

/**
 * @param {PageData} page
 * @param {string} id
 */
export function channelView(page, id) {
  const channel = page.channels[id];
  const title = heading("Channel", breakable(id), capital(describeNode(id)), ". ", ...elsewhere(page, id));
  if (!channel) return [title, inCircuits(page, id), noChannel(id)];
  return [
    title,
    stats(
      stat("active at", percent(channel.density), `of ${count(channel.tokens)} tokens, ${page.text}`),
      stat("mean", signed(channel.mean), "over all tokens"),
      channel.dense &&
        stat(
          "correlation, encoder’s reading",
          signed(channel.dense.encoder_correlation, 2),
          `active in both at ${percent(channel.dense.both_active)} of tokens, ` +
            `in either at ${percent(channel.dense.either_active)}`,
        ),
      channel.dense &&
        stat("KL in the dense model", num(channel.dense.kl), `random directions ${num(channel.dense.kl_random)}`),
    ),
    inCircuits(page, id),
    contextsSection(channel),
    section(
      "Values where it is not zero",
      "Line over the plot: 5th to 95th percentile, thick in the middle half, a dot at the median.",
      values(channel),
    ),
    section(
      "Weights",
      "The strongest, by size. Tokens are rows of the embedding and the unembedding.",
      h(
        "div",
        { class: "columns" },
        weightList("Incoming", channel.weights_in),
        weightList("Outgoing", channel.weights_out),
      ),
    ),
    section("In the dense model", null, ...denseSide(channel)),
  ];
}

/** @param {string} text */
function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * Links to other nodes of the page on the same channel of the stream.
 * @param {PageData} page
 * @param {string} id
 */
function elsewhere(page, id) {
  const stream = /\.(?:read|write)\.(\d+)$/.exec(id);
  const same = stream
    ? allNodes(page).filter((one) => one !== id && /\.(?:read|write)\.\d+$/.test(one) && one.endsWith(`.${stream[1]}`))
    : [];
  return same.length
    ? ["The same channel of the stream: ", ...same.flatMap((one, i) => [i > 0 && ", ", nodeName(one)]), "."]
    : [];
}

/**
 * @param {PageData} page
 * @param {string} id
 */
function inCircuits(page, id) {
  const found = circuitsOf(page, id);
  if (found.length === 0) return null;
  const rows = found.map(({ circuit, index }) => {
    const node = circuit.nodes[index];
    const joined = circuit.edges.filter(
      (edge) => edge.kind === "weight" && (edge.source === index || edge.target === index),
    ).length;
    return [
      h("a", { href: href("circuit", circuit.task) }, ...breakable(circuit.task)),
      signed(node.mean),
      signed(node.ablation),
      joined,
    ];
  });
  return section(
    "In circuits",
    null,
    scroller(
      "Circuits of this node",
      plainTable("Circuits of this node", ["circuit", "mean", "loss when frozen", "weights in the circuit"], rows),
    ),
  );
}

/** @param {Channel} channel */
function contextsSection(channel) {
  const byTask = Object.entries(channel.task_contexts);
  const all = [
    ...channel.positive,
    ...channel.negative,
    ...channel.random,
    ...byTask.flatMap(([, contexts]) => contexts),
  ];
  const scale = contextScale(all);
  const signs = (/** @type {Context[]} */ positive, /** @type {Context[]} */ negative, /** @type {string} */ where) =>
    h(
      "div",
      { class: "columns" },
      contextList(`Most positive${where}`, positive, scale, "It is never positive here."),
      contextList(`Most negative${where}`, negative, scale, "It is never negative here."),
    );
  const box = h(
    "div",
    { class: "shade-values" },
    signs(channel.positive, channel.negative, ""),
    ...byTask.map(([task, contexts]) =>
      signs(
        contexts.filter((one) => one.value > 0).sort((a, b) => b.value - a.value),
        contexts.filter((one) => one.value < 0).sort((a, b) => a.value - b.value),
        `, task ${task}`,
      ),
    ),
    contextList("Random tokens where it is active", channel.random, scale, "It is active nowhere in the text.", true),
  );
  const readings = all.some((one) => one.readings !== null && one.readings !== undefined);
  const toggle =
    readings &&
    choice(
      "shade by",
      [
        ["values", "node’s value"],
        ["readings", "encoder’s reading"],
      ],
      "values",
      (by) => (box.className = `shade-${by}`),
    );
  return section(
    "Contexts",
    [
      "Both signs mean something. ",
      h("span", { class: "swatch-positive" }, "positive"),
      " ",
      h("span", { class: "swatch-negative" }, "negative"),
      readings
        ? "; each line starts with the node’s value at the outlined token, " +
          "under it what the encoder reads there in the dense model."
        : "; each line starts with the value at the outlined token.",
    ],
    toggle,
    box,
    all.length > 0 &&
      tableView("value of every token", ["context", "token", "node’s value", "encoder’s reading"], () =>
        tokenRows(all),
      ),
  );
}

/** @param {Context[]} contexts */
function tokenRows(contexts) {
  return contexts.flatMap(({ row, position, at, tokens, values, readings }) =>
    tokens.map((token, i) => [
      `row ${row}, position ${position - at + i}`,
      chip(token),
      signed(values[i]),
      signed(readings?.[i]),
    ]),
  );
}

/** @param {Channel} channel */
function values({ histogram, percentiles }) {
  const entries = Object.entries(percentiles).sort(([a], [b]) => Number(a) - Number(b));
  return [
    histogram && histogram.counts.length
      ? histogramPlot(histogram, percentiles)
      : missing("The page holds no histogram of this node."),
    entries.length > 0 &&
      scroller(
        "Percentiles",
        h(
          "table",
          { class: "percentiles" },
          h("caption", { class: "hidden" }, "Percentiles"),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "percentile"),
              ...entries.map(([key]) => h("th", { scope: "col" }, key)),
            ),
          ),
          h(
            "tbody",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "row" }, "value"),
              ...entries.map(([, value]) => h("td", { class: "number" }, num(value))),
            ),
          ),
        ),
      ),
    histogram &&
      tableView("histogram", ["from", "to", "tokens"], () =>
        histogram.counts.map((n, i) => [num(histogram.edges[i]), num(histogram.edges[i + 1]), count(n)]),
      ),
  ];
}

/**
 * @param {string} title
 * @param {[string, number][]} weights
 */
function weightList(title, weights) {
  if (weights.length === 0) return h("div", {}, h("h3", {}, title), h("p", { class: "quiet" }, "None."));
  return barList(
    title,
    weights.map(([id, weight]) => ({ name: nodeName(id), value: weight, text: signed(weight) })),
    20,
  );
}
