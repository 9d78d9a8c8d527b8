// The small parts that every view is made of.
import { h, vary } from "./dom.js";
import { percent, visible } from "./format.js";
import { href } from "./router.js";

/**
 * A figure, with its control beside it in a quieter tone.
 * @param {string} value
 * @param {string} control what it is compared with, and that one's figure
 */
export function figure(value, control = "") {
  return h("span", { class: "figure" }, h("span", { class: "value" }, value), control && [" ", quiet(control)]);
}

/** A model that answers so large a share of a task's prompts right solves it. */
export const SOLVED = 0.9;

/**
 * How many prompts tell whether a task is solved: one number, or the least and the most; "its" without tasks.
 * @param {import("./types.js").Task[]} tasks
 */
export function promptCount(tasks) {
  if (tasks.length === 0) return "its";
  const counts = tasks.map((task) => task.pairs);
  const [least, most] = [Math.min(...counts), Math.max(...counts)];
  return least === most ? String(most) : `${least} to ${most}`;
}

/**
 * Whether a model solves a task, with the share of prompts it answers right.
 * @param {number | null} share
 */
export function solvedMark(share) {
  if (share === null) return quiet("not measured");
  const solved = share >= SOLVED;
  return h(
    "span",
    { class: solved ? "solved" : "unsolved" },
    h("span", { "aria-hidden": "true" }, solved ? "● " : "○ "),
    figure(percent(share)),
    h("span", { class: "hidden" }, solved ? " solved" : " not solved"),
  );
}

/**
 * Text with what stands between backticks as code.
 * @param {string} text
 */
export function withCode(text) {
  return text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));
}

/**
 * Text in the quieter tone of controls.
 * @param {...import("./dom.js").Child} text
 */
export function quiet(...text) {
  return h("span", { class: "quiet" }, ...text);
}

/**
 * A large figure with its name, and its control under it.
 * @param {string} name
 * @param {string} value
 * @param {string} [control]
 */
export function stat(name, value, control = "") {
  return h(
    "div",
    { class: "stat" },
    h("dt", {}, name),
    h("dd", {}, h("span", { class: "value" }, value), control && h("span", { class: "quiet" }, control)),
  );
}

/** @param {...import("./dom.js").Child} children */
export function stats(...children) {
  return h("dl", { class: "stats" }, ...children);
}

/**
 * A section with its heading and a sentence under it.
 * @param {string} title
 * @param {import("./dom.js").Child} lead
 * @param {...import("./dom.js").Child} children
 */
export function section(title, lead, ...children) {
  return h("section", {}, h("h2", {}, title), lead && h("p", { class: "lead" }, lead), ...children);
}

/**
 * A view's heading; it takes the focus when the view opens.
 * @param {string} kicker
 * @param {import("./dom.js").Child} title
 * @param {...import("./dom.js").Child} lead
 */
export function heading(kicker, title, ...lead) {
  return h(
    "header",
    { class: "heading" },
    kicker && h("p", { class: "kicker" }, kicker),
    h("h1", { tabindex: -1 }, title),
    lead.length > 0 && h("p", { class: "lead" }, ...lead),
  );
}

/**
 * A name that may break at its dots and underscores.
 * @param {string} name
 * @returns {import("./dom.js").Child[]}
 */
export function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part, i) => (i ? [h("wbr"), part] : [part]));
}

/**
 * A link to a channel's view, or a token as a chip.
 * @param {string} id
 */
export function nodeName(id) {
  if (id.startsWith("token ")) return h("span", { class: "token-name" }, quiet("token "), chip(id.slice(6)));
  return h("a", { class: "node-name", href: href("channel", id) }, ...breakable(id));
}

/**
 * A token on its own, its spaces visible.
 * @param {string} token
 */
export function chip(token) {
  return h("span", { class: "chip" }, visible(token));
}

/**
 * A sentence in a box that says what is missing, and how to make it.
 * @param {...import("./dom.js").Child} text
 */
export function missing(...text) {
  return h("p", { class: "missing" }, ...text);
}

/** @param {string} command */
export function code(command) {
  return h("code", {}, command);
}

/**
 * A plot's table, made when it is opened.
 * @param {string} name what is in it
 * @param {string[]} head
 * @param {() => import("./dom.js").Child[][]} rows
 */
export function tableView(name, head, rows) {
  const details = h("details", { class: "table-view" }, h("summary", {}, `Table: ${name}`));
  details.addEventListener(
    "toggle",
    () => details.childElementCount === 1 && details.append(scroller(name, plainTable(name, head, rows()))),
  );
  return details;
}

/**
 * @param {string} caption
 * @param {string[]} head
 * @param {import("./dom.js").Child[][]} rows
 */
export function plainTable(caption, head, rows) {
  return h(
    "table",
    {},
    h("caption", { class: "hidden" }, caption),
    h("thead", {}, h("tr", {}, ...head.map((name) => h("th", { scope: "col" }, name)))),
    h(
      "tbody",
      {},
      ...rows.map(([first, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, first), ...cells.map((cell) => h("td", {}, cell))),
      ),
    ),
  );
}

/**
 * A region that scrolls sideways where it is too wide, from the keyboard as well.
 * @param {string} name
 * @param {...import("./dom.js").Child} children
 */
export function scroller(name, ...children) {
  return h("div", { class: "scroller", role: "region", tabindex: 0, "aria-label": name }, ...children);
}

/**
 * @typedef {object} Bar
 * @property {import("./dom.js").Child} name
 * @property {number | null} value
 * @property {string} text
 */

/**
 * Values as bars from a common zero, to the right if positive and to the left if negative; a table underneath.
 * @param {string} caption
 * @param {Bar[]} bars
 * @param {number} [shown] how many before "show all"
 */
export function barList(caption, bars, shown = 24) {
  const values = bars.map((bar) => bar.value ?? 0);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const span = high - low || 1;
  const body = h("tbody");
  const row = (/** @type {Bar} */ bar) => {
    const value = bar.value ?? 0;
    const mark = vary(h("span", { class: value < 0 ? "bar negative" : "bar" }), {
      "--from": (Math.min(value, 0) - low) / span,
      "--size": Math.abs(value) / span,
    });
    const cell = vary(h("td", { class: "track" }, mark), { "--zero": -low / span });
    return h("tr", {}, h("th", { scope: "row" }, bar.name), cell, h("td", { class: "number" }, bar.text));
  };
  body.append(...bars.slice(0, shown).map(row));
  const table = h(
    "table",
    { class: low < 0 && high > 0 ? "bars both" : "bars" },
    h("caption", {}, caption),
    h(
      "thead",
      { class: "hidden" },
      h("tr", {}, ...["name", "bar", "value"].map((name) => h("th", { scope: "col" }, name))),
    ),
    body,
  );
  if (bars.length <= shown) return table;
  const more = h("button", { type: "button", class: "more", onclick: showAll }, `show all ${bars.length}`);
  function showAll() {
    body.append(...bars.slice(shown).map(row));
    more.remove();
  }
  return h("div", {}, table, more);
}

/**
 * Buttons of which one is chosen.
 * @template {string} T
 * @param {string} name
 * @param {[T, string][]} choices value and label
 * @param {T} chosen
 * @param {(value: T) => void} choose
 */
export function choice(name, choices, chosen, choose) {
  const buttons = choices.map(([value, label]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => pick(value) }, label),
  );
  /** @param {T} value */
  function pick(value) {
    choices.forEach(([one], i) => buttons[i].setAttribute("aria-pressed", String(one === value)));
    choose(value);
  }
  return h("div", { class: "choice", role: "group", "aria-label": name }, quiet(name), ...buttons);
}
