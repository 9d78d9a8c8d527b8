// Search over views, tasks, circuits, channels and nodes: "/" goes there, arrows choose, Enter opens.
import { h } from "./dom.js";
import { describeNode, visible } from "./format.js";
import { href } from "./router.js";

/** @typedef {import("./types.js").PageData} PageData */
/** @typedef {{kind: string, label: string, note: string, address: string, text: string}} Entry */

const MOST = 12;

/**
 * @param {PageData} page
 * @returns {Entry[]}
 */
export function searchEntries(page) {
  const views = ["overview", "bridges", "tasks", "circuit", "channel"].map((view) =>
    entry("view", view, "", href(view), ""),
  );
  const tasks = page.tasks.map((task) =>
    entry("task", task.name, "", href("task", task.name), task.examples[0]?.prompt.join("") ?? ""),
  );
  const circuits = Object.values(page.circuits).map((one) =>
    entry("circuit", one.task, `${one.nodes.length} nodes`, href("circuit", one.task), ""),
  );
  return [...views, ...tasks, ...circuits, ...nodeEntries(page)];
}

/** @param {PageData} page */
function nodeEntries(page) {
  /** @type {Map<string, string[]>} words of a node: tokens it is strongest at, tokens it has weights with */
  const words = new Map();
  const add = (/** @type {string} */ id, /** @type {string[]} */ more) =>
    words.set(id, [...(words.get(id) ?? []), ...more]);
  for (const channel of Object.values(page.channels)) {
    const tokens = [...channel.positive, ...channel.negative].map((one) => one.tokens[one.at]);
    const weights = [...channel.weights_in, ...channel.weights_out].flatMap(([name]) =>
      name.startsWith("token ") ? [name.slice(6)] : [],
    );
    add(channel.node, [...new Set([...weights, ...tokens])]);
  }
  for (const circuit of Object.values(page.circuits)) {
    for (const node of circuit.nodes) add(node.id, node.tokens ? [node.tokens] : []);
  }
  return [...words].map(([id, tokens]) =>
    entry(
      page.channels[id] ? "channel" : "node",
      id,
      tokens.slice(0, 4).map(visible).join("  "),
      href("channel", id),
      `${describeNode(id)} ${tokens.join(" ")}`,
    ),
  );
}

/**
 * @param {string} kind
 * @param {string} label
 * @param {string} note
 * @param {string} address
 * @param {string} text what else it is found by
 * @returns {Entry}
 */
function entry(kind, label, note, address, text) {
  return { kind, label, note, address, text: `${kind} ${label} ${text}`.toLowerCase() };
}

/**
 * Entries that hold every word, best first: equal to a part of the name, then at the start of the name, then anywhere.
 * @param {Entry[]} entries
 * @param {string} query
 */
export function find(entries, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return [];
  const score = (/** @type {Entry} */ one) => {
    const name = one.label.toLowerCase();
    const parts = name.split(".");
    return words.reduce(
      (sum, word) =>
        sum + (name === word || parts.includes(word) ? 3 : name.startsWith(word) ? 2 : name.includes(word) ? 1 : 0),
      0,
    );
  };
  const found = entries.filter((one) => words.every((word) => one.text.includes(word)));
  return found
    .map((one) => ({ one, score: score(one) }))
    .sort((a, b) => b.score - a.score)
    .map(({ one }) => one);
}

/**
 * @param {HTMLInputElement} input
 * @param {HTMLElement} list
 * @param {PageData} page
 */
export function mountSearch(input, list, page) {
  /** @type {Entry[] | null} made when it is first needed */
  let entries = null;
  /** @type {Entry[]} */
  let found = [];
  let chosen = 0;
  const close = () => show([]);
  /** @param {Entry[]} next */
  function show(next) {
    found = next;
    chosen = 0;
    list.replaceChildren(
      ...(found.length
        ? found.map(option)
        : input.value.trim()
          ? [
              h(
                "li",
                { class: "quiet", role: "option", "aria-disabled": "true", "aria-selected": "false" },
                "Nothing is called so.",
              ),
            ]
          : []),
    );
    list.hidden = !input.value.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    mark();
  }
  function mark() {
    [...list.children].forEach((item, i) =>
      item.setAttribute("aria-selected", String(found.length > 0 && i === chosen)),
    );
    if (found.length) input.setAttribute("aria-activedescendant", `found-${chosen}`);
    else input.removeAttribute("aria-activedescendant");
    list.children[chosen]?.scrollIntoView({ block: "nearest" });
  }
  /** @param {Entry} one */
  function open(one) {
    input.value = "";
    close();
    input.blur();
    location.hash = one.address;
  }
  /**
   * @param {Entry} one
   * @param {number} i
   */
  function option(one, i) {
    // The pointer's press must not take the focus off the field before the click arrives.
    return h(
      "li",
      {
        role: "option",
        id: `found-${i}`,
        onmousedown: (/** @type {Event} */ event) => event.preventDefault(),
        onclick: () => open(one),
      },
      h("span", { class: "quiet kind" }, one.kind),
      h("span", {}, one.label),
      one.note && h("span", { class: "quiet note" }, one.note),
    );
  }
  input.addEventListener("input", () => show(find((entries ??= searchEntries(page)), input.value).slice(0, MOST)));
  input.addEventListener("blur", () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
  });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step !== undefined && found.length) {
      event.preventDefault();
      chosen = (chosen + step + found.length) % found.length;
      mark();
    } else if (event.key === "Enter" && found.length) open(found[chosen]);
    else if (event.key === "Escape") {
      input.value = "";
      close();
    }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    input.focus();
  });
}
