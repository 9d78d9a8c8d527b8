// All circuits in a table.
import { h } from "../dom.js";
import { num, percent } from "../format.js";
import { noCircuits } from "../hints.js";
import { href } from "../router.js";
import { sortable } from "../sortable.js";
import { breakable, figure, heading } from "../ui.js";

/** @typedef {import("../types.js").Circuit} Circuit */

/** @param {import("../types.js").PageData} page */
export function circuitsView({ circuits }) {
  const title = heading(
    "Circuits",
    "The few nodes that do a task",
    "A circuit is what is left of the sparse model when every other node is frozen at its mean. " +
      "Loss is in nats; guessing is 0.693. In a quieter tone: the whole model, and the model without " +
      "the circuit.",
  );
  const rows = Object.values(circuits);
  if (rows.length === 0) return [title, noCircuits()];
  const weights = (/** @type {Circuit} */ one) => one.edges.filter((edge) => edge.kind === "weight").length;
  const { element } = sortable({
    caption: "Circuits. Press a column’s name to sort by it, a row to open the circuit.",
    rows,
    link: (one) => href("circuit", one.task),
    columns: [
      {
        label: "task",
        text: true,
        value: (one) => one.task,
        cell: (one) => h("a", { href: href("circuit", one.task) }, ...breakable(one.task)),
      },
      { label: "nodes", value: (one) => one.nodes.length, cell: (one) => one.nodes.length },
      { label: "weights", value: weights, cell: weights },
      {
        label: "loss",
        note: "whole model",
        value: (one) => one.loss,
        cell: (one) => figure(num(one.loss), num(one.loss_full_model)),
      },
      {
        label: "right, other pairs",
        note: "without it",
        value: (one) => one.fresh?.accuracy,
        cell: (one) =>
          one.fresh && figure(percent(one.fresh.accuracy), one.ablated ? percent(one.ablated.accuracy) : ""),
      },
      {
        label: "controls against it",
        value: (one) => one.controls.filter((control) => control.as_good).length,
        cell: (one) => {
          const judged = one.controls.filter((control) => control.as_good !== null);
          return judged.length
            ? `${judged.filter((control) => control.as_good).length} of ${judged.length}`
            : "none measured";
        },
      },
    ],
  });
  return [title, element];
}
