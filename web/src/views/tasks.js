// All tasks in a table.
import { bestSweep, valueAt } from "../curves.js";
import { h } from "../dom.js";
import { nodesOf, num } from "../format.js";
import { noTasks } from "../hints.js";
import { href } from "../router.js";
import { sortable } from "../sortable.js";
import { breakable, figure, heading, promptCount, quiet, section, solvedMark } from "../ui.js";

/** @typedef {import("../types.js").Task} Task */

/** @param {import("../types.js").PageData} page */
export function tasksView(page) {
  const title = heading(
    "Tasks",
    "What both models solve, and what an edit turns",
    "A task is pairs of prompts that differ in a cue and so in their answers. Filled: solved, 90% " +
      `of ${promptCount(page.tasks)} prompts or more. P(target) is at strength 1, of one channel where it turns both models, ` +
      "else of a few; in a quieter tone random directions of the same norm.",
  );
  if (page.tasks.length === 0) return [title, noTasks()];
  const table = sortable({
    caption: "Tasks. Press a column’s name to sort by it, a row to open the task.",
    columns: columns(page),
    rows: page.tasks,
    link: (task) => href("task", task.name),
  });
  return [title, table.element, leftOut(page)];
}

/** @param {import("../types.js").PageData} page */
function leftOut({ left_out: reasons }) {
  const names = Object.keys(reasons);
  if (names.length === 0) return null;
  return section(
    "Left out",
    "Tasks that the page does not have, and why.",
    h("dl", { class: "terms" }, ...names.map((name) => h("div", {}, h("dt", {}, name), h("dd", {}, reasons[name])))),
  );
}

/**
 * @param {import("../types.js").PageData} page
 * @returns {import("../sortable.js").Column<Task>[]}
 */
function columns(page) {
  const at = (/** @type {Task} */ task, /** @type {import("../types.js").CurveName} */ name) => {
    const sweep = bestSweep(task);
    return sweep && valueAt(sweep, name);
  };
  const agreement = (/** @type {Task} */ task) => bestSweep(task)?.agreement ?? null;
  return [
    {
      label: "task",
      text: true,
      value: (task) => task.name,
      cell: (task) => h("a", { href: href("task", task.name) }, ...breakable(task.name)),
    },
    { label: "dense solves", value: (task) => task.solved.dense, cell: (task) => solvedMark(task.solved.dense) },
    { label: "sparse solves", value: (task) => task.solved.sparse, cell: (task) => solvedMark(task.solved.sparse) },
    {
      label: "circuit",
      note: "nodes, weights",
      value: (task) => task.circuit?.edges,
      cell: (task) => circuitCell(page, task),
    },
    { label: "channels edited", text: true, value: (task) => bestSweep(task)?.site, cell: channelsCell },
    {
      label: "dense P(target)",
      note: "random",
      value: (task) => at(task, "p_target"),
      cell: (task) =>
        bestSweep(task) && figure(num(at(task, "p_target"), 2), num(at(task, "p_target_random_direction"), 2)),
    },
    {
      label: "sparse P(target)",
      value: (task) => at(task, "p_target_sparse_model"),
      cell: (task) => bestSweep(task) && num(at(task, "p_target_sparse_model"), 2),
    },
    {
      label: "agreement R²",
      note: "other channels",
      value: (task) => agreement(task)?.r_squared,
      cell: (task) =>
        agreement(task) && figure(num(agreement(task)?.r_squared, 2), num(agreement(task)?.r_squared_shuffled, 2)),
    },
  ];
}

/**
 * @param {import("../types.js").PageData} page
 * @param {Task} task
 */
function circuitCell(page, task) {
  if (!task.circuit) return h("span", { class: "quiet", title: task.circuit_missing }, "–");
  const size = `${task.circuit.nodes}, ${task.circuit.edges}`;
  return page.circuits[task.name] ? h("a", { href: href("circuit", task.name) }, size) : size;
}

/** @param {Task} task */
function channelsCell(task) {
  const sweep = bestSweep(task);
  if (!sweep) return h("span", { class: "quiet", title: task.steering_missing }, "–");
  const links = nodesOf(sweep).flatMap((node, i) => [
    i > 0 && ", ",
    h("a", { href: href("channel", node) }, node.split(".").at(-1)),
  ]);
  return [...links, " ", quiet(`at ${sweep.site}`)];
}
