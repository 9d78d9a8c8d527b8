// One circuit: its graph, its figures beside their controls, ablations, attention.
import { h } from "../dom.js";
import { count, many, num, percent, signed } from "../format.js";
import { noCircuit } from "../hints.js";
import { attentionView } from "../plots/attention.js";
import { circuitGraph } from "../plots/circuit-graph.js";
import { href } from "../router.js";
import { barList, breakable, code, heading, missing, nodeName, quiet, section, stat, stats, tableView } from "../ui.js";

/** @typedef {import("../types.js").Circuit} Circuit */

/**
 * @param {import("../types.js").PageData} page
 * @param {string} name
 */
export function circuitView(page, name) {
  const circuit = page.circuits[name];
  if (!circuit)
    return [heading("Circuit", breakable(name)), noCircuit(page.tasks.find((task) => task.name === name) ?? name)];
  return [
    heading(
      "Circuit",
      breakable(name),
      "Every node outside it is frozen at its mean. ",
      page.tasks.some((task) => task.name === name) && h("a", { href: href("task", name) }, "The task"),
    ),
    size(circuit),
    controls(circuit),
    section(
      "Graph",
      "Layers from left to right. A line is a nonzero weight from one node to another.",
      circuitGraph(circuit),
      ...tables(circuit),
    ),
    section(
      "Ablations",
      "Loss with one node, or the circuit’s nodes of one layer, frozen at the mean, less that of the circuit.",
      h("div", { class: "columns" }, ...ablations(circuit)),
    ),
    section("Loss before and after pruning", null, losses(circuit)),
    section(
      "Attention",
      "A head’s pattern on a prompt; what a row lacks to 1 goes to an attention sink.",
      circuit.attention.length
        ? attentionView(circuit.attention)
        : missing("No attention pattern is in the page: no head is in this circuit, or none was recorded."),
    ),
  ];
}

/** @param {Circuit} circuit */
function weightsOf(circuit) {
  return circuit.edges.filter((edge) => edge.kind === "weight");
}

/** @param {Circuit} circuit */
function size(circuit) {
  const { fresh, ablated } = circuit;
  return stats(
    stat("nodes", count(circuit.nodes.length)),
    stat("nonzero weights", count(weightsOf(circuit).length)),
    stat("loss of the circuit", num(circuit.loss), `whole model ${num(circuit.loss_full_model)}`),
    fresh &&
      stat(
        "right on other pairs",
        percent(fresh.accuracy),
        ablated ? `model without the circuit ${percent(ablated.accuracy)}` : "guessing 50%",
      ),
  );
}

/** @param {Circuit} circuit */
function controls({ controls: all, verdict, task }) {
  if (all.length === 0 && verdict.length === 0) {
    return section(
      "Controls",
      null,
      missing(
        "No control was measured, so the size says little; ",
        code(`bridges report FOLDER --tasks ${task}`),
        " measures them.",
      ),
    );
  }
  return section(
    "Controls",
    "What else does as well? A circuit’s size means something beside these.",
    verdict.length > 0 && h("ul", { class: "verdict" }, ...verdict.map((sentence) => h("li", {}, sentence))),
    all.length > 0 &&
      h(
        "dl",
        { class: "control-list" },
        ...all.map((control) =>
          h(
            "div",
            { class: control.as_good ? "as-good" : null },
            h("dt", {}, control.name),
            h("dd", {}, control.value, control.as_good && [" ", h("strong", {}, "This counts against the circuit.")]),
          ),
        ),
      ),
  );
}

/** @param {Circuit} circuit */
function tables(circuit) {
  const inOrder = () => weightsOf(circuit).toSorted((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  return [
    tableView("weights", ["from", "to", "weight"], () =>
      inOrder().map((edge) => [
        nodeName(circuit.nodes[edge.source].id),
        nodeName(circuit.nodes[edge.target].id),
        signed(edge.weight),
      ]),
    ),
    tableView("nodes", ["node", "mean", "loss when frozen", "tokens"], () =>
      circuit.nodes.map((node) => [nodeName(node.id), signed(node.mean), signed(node.ablation), node.tokens]),
    ),
  ];
}

/** @param {Circuit} circuit */
function ablations(circuit) {
  const nodes = circuit.nodes
    .filter((node) => node.ablation !== null)
    .sort((a, b) => (b.ablation ?? 0) - (a.ablation ?? 0));
  const bars = nodes.map((node) => ({ name: nodeName(node.id), value: node.ablation, text: signed(node.ablation) }));
  const layers = circuit.ablation_by_layer.map(({ layer, loss }) => ({ name: layer, value: loss, text: signed(loss) }));
  const part = bars.length < circuit.nodes.length ? `, ${bars.length} of ${circuit.nodes.length} nodes measured` : "";
  return [
    bars.length
      ? barList(`Per node, change of the loss in nats${part}`, bars, 16)
      : missing("No node’s ablation was measured."),
    layers.length
      ? barList("Per layer, change of the loss in nats", layers)
      : missing("No layer’s ablation was measured."),
  ];
}

/** @param {Circuit} circuit */
function losses(circuit) {
  const { fresh, ablated } = circuit;
  const bars = [
    { name: "whole model", value: circuit.loss_full_model },
    { name: "circuit, on the pairs it was found on", value: circuit.loss },
    ...(fresh
      ? [
          { name: `circuit, on ${many(fresh.pairs, "other pair")}`, value: fresh.loss },
          { name: "the same, logits unscaled", value: fresh.loss_unscaled },
        ]
      : []),
    ...(ablated ? [{ name: "model without the circuit", value: ablated.loss }] : []),
    { name: quiet("guessing"), value: Math.LN2 },
  ].map((bar) => ({ ...bar, text: num(bar.value) }));
  return [
    barList("Loss in nats", bars),
    h(
      "p",
      { class: "quiet" },
      `Logit differences of the circuit are scaled by ${num(circuit.scale, 2)} ` +
        `and shifted by ${num(circuit.shift, 2)} before the loss.`,
    ),
  ];
}
