// One task: its prompts, the edits of one and of few channels, their side effects.
import { valueAt } from "../curves.js";
import { h } from "../dom.js";
import { agreementStat, bothModels, editName } from "../edits.js";
import { count, many, nodesOf, num, percent, signed } from "../format.js";
import { noCircuit, noSteering } from "../hints.js";
import { dosePlot } from "../plots/dose.js";
import { href } from "../router.js";
import {
  breakable,
  chip,
  figure,
  heading,
  missing,
  nodeName,
  plainTable,
  quiet,
  scroller,
  section,
  solvedMark,
  stat,
  stats,
  withCode,
} from "../ui.js";

/** @typedef {import("../types.js").Task} Task */
/** @typedef {import("../types.js").Sweep} Sweep */

/**
 * @param {import("../types.js").PageData} page
 * @param {string} name
 */
export function taskView(page, name) {
  const task = page.tasks.find((one) => one.name === name);
  if (!task)
    return [
      heading("Task", name),
      missing(`No task of this name is in the page. `, h("a", { href: href("tasks") }, "All tasks")),
    ];
  const sweeps = /** @type {[string, Sweep][]} */ (
    [
      ["one channel", task.steering.one],
      ["few channels", task.steering.few],
    ].filter(([, sweep]) => sweep)
  );
  return [
    heading("Task", breakable(task.name), ...withCode(task.description), ` ${many(task.pairs, "pair")} of prompts that differ in a cue.`),
    taskStats(page, task),
    section(
      "Prompts",
      "The cue, where the prompts of a pair differ, is shaded; after each, its answer.",
      examples(task),
    ),
    ...(sweeps.length
      ? sweeps.map(([label, sweep]) => sweepSection(label, sweep))
      : [section("Edits", null, noSteering(task))]),
    sweeps.some(([, sweep]) => sweep.side_effects) &&
      section(
        "Side effects",
        "What the edits do where they should do nothing. KL is of the dense model from itself " +
          "unedited, nats per token.",
        sideEffects(sweeps),
      ),
    !task.circuit && section("Circuit", null, noCircuit(task)),
  ];
}

/**
 * @param {import("../types.js").PageData} page
 * @param {Task} task
 */
function taskStats(page, task) {
  const size = task.circuit && `${many(task.circuit.nodes, "node")}, ${many(task.circuit.edges, "weight")}`;
  const link = size && page.circuits[task.name] ? h("a", { href: href("circuit", task.name) }, size) : size;
  return h(
    "dl",
    { class: "stats" },
    h("div", { class: "stat" }, h("dt", {}, "dense model solves"), h("dd", {}, solvedMark(task.solved.dense))),
    h("div", { class: "stat" }, h("dt", {}, "sparse model solves"), h("dd", {}, solvedMark(task.solved.sparse))),
    task.circuit &&
      h(
        "div",
        { class: "stat" },
        h("dt", {}, "circuit"),
        h("dd", {}, h("span", { class: "value" }, link), quiet(`loss ${num(task.circuit.loss)}`)),
      ),
  );
}

/** @param {Task} task */
function examples(task) {
  if (task.examples.length === 0) return missing("The page holds no prompts of this task.");
  return h(
    "ol",
    { class: "examples" },
    ...task.examples.map((example) => {
      const cue = new Set(example.cue);
      const line = (/** @type {string} */ name, /** @type {string[]} */ tokens, /** @type {string[]} */ answers) =>
        h(
          "div",
          {},
          quiet(name),
          h(
            "span",
            { class: "tokens" },
            ...tokens.map((token, i) =>
              cue.has(i) ? h("mark", {}, token) : /^<\|.*\|>$/.test(token) ? quiet(token) : token,
            ),
            h("span", { class: "answer" }, " ", h("span", { "aria-hidden": "true" }, "→ "), ...answers.map(chip)),
          ),
        );
      return h(
        "li",
        {},
        line("prompt", example.prompt, example.answers),
        line("counterfactual", example.counterfactual, example.targets),
      );
    }),
  );
}

/**
 * @param {string} label
 * @param {Sweep} sweep
 */
function sweepSection(label, sweep) {
  const { agreement, p_target_by_direction: directions } = sweep;
  const what = editName(sweep);
  return section(
    label === "one channel" ? "Editing one channel" : "Editing a few channels",
    [
      nodesOf(sweep).flatMap((node, i) => [i > 0 && ", ", nodeName(node)]),
      ` · added to ${sweep.at === "read" ? "the sublayer’s input alone" : "the stream"}`,
      ` · ${many(sweep.prompts, "held-out prompt")}`,
    ],
    stats(
      ...bothModels(sweep),
      agreementStat(sweep),
      agreement && stat("slope", num(agreement.slope, 2), `same sign ${percent(agreement.sign)}`),
      directions && stat("by task order", directions.map((p) => num(p)).join(" / "), "P(target) at strength 1"),
    ),
    dosePlot(sweep, what),
  );
}

/** @param {[string, Sweep][]} sweeps */
function sideEffects(sweeps) {
  const measured = /** @type {[string, Sweep, import("../types.js").SideEffects][]} */ (
    sweeps.flatMap(([label, sweep]) => (sweep.side_effects ? [[label, sweep, sweep.side_effects]] : []))
  );
  /** @type {[string, (effects: import("../types.js").SideEffects, sweep: Sweep) => import("../dom.js").Child][]} */
  const rows = [
    ["KL on other text, channels off everywhere", (e) => figure(num(e.kl), `${count(e.tokens)} tokens`)],
    ["cross-entropy on other text, channels off", (e) => signed(e.ce_change)],
    [
      "P(target), channels off",
      (e, sweep) => figure(num(e.p_target_off), `unedited ${num(valueAt(sweep, "p_target", 0))}`),
    ],
    ["KL on other text, the edit’s mean change added everywhere", (e) => num(e.kl_added)],
    ["KL on the prompts before the answer, the edit itself", (e) => num(e.kl_before_answer)],
    ["KL at other tasks’ answers, channels off", (e) => num(e.kl_other_tasks)],
    [
      "other tasks’ prompts solved, channels off",
      (e) =>
        e.solved_other_tasks
          ? figure(percent(e.solved_other_tasks[1]), `unedited ${percent(e.solved_other_tasks[0])}`)
          : "–",
    ],
  ];
  return scroller(
    "Side effects",
    plainTable(
      "Side effects",
      ["", ...measured.map(([label]) => label)],
      rows.map(([name, value]) => [name, ...measured.map(([, sweep, effects]) => value(effects, sweep))]),
    ),
  );
}
