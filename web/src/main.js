// The page: reads its data, shows the view that the address names.
import { download, readData } from "./data.js";
import { h } from "./dom.js";
import { href, parseAddress } from "./router.js";
import { mountSearch } from "./search.js";
import { mountTheme } from "./theme.js";
import { hideTip, mountTooltip } from "./tooltip.js";
import { heading } from "./ui.js";
import { bridgesView } from "./views/bridges.js";
import { channelView } from "./views/channel.js";
import { channelsView } from "./views/channels.js";
import { circuitView } from "./views/circuit.js";
import { circuitsView } from "./views/circuits.js";
import { overview } from "./views/overview.js";
import { taskView } from "./views/task.js";
import { tasksView } from "./views/tasks.js";

/** @typedef {import("./types.js").PageData} PageData */

/** The menu entry that a view belongs to. @type {Record<string, string>} */
const MENU = { task: "tasks" };
/** @type {Record<string, (page: PageData, name: string) => import("./dom.js").Child>} */
const VIEWS = {
  overview,
  bridges: bridgesView,
  tasks: tasksView,
  task: taskView,
  circuit: (page, name) => (name ? circuitView(page, name) : circuitsView(page)),
  channel: (page, name) => (name ? channelView(page, name) : channelsView(page)),
};

/** @param {PageData} page */
function start(page) {
  const main = element("main");
  mountTooltip();
  mountTheme(/** @type {HTMLButtonElement} */ (element("theme")));
  mountSearch(/** @type {HTMLInputElement} */ (element("search")), element("found"), page);
  element("download").addEventListener("click", () => download(page));
  element("versions").textContent = Object.entries(page.versions)
    .map(([name, version]) => `${name} ${version}`)
    .join(" · ");
  element("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  show(page, main, false);
  addEventListener("hashchange", () => show(page, main, true));
}

/**
 * @param {PageData} page
 * @param {HTMLElement} main
 * @param {boolean} moved whether the reader came from another view
 */
function show(page, main, moved) {
  const { view, name } = parseAddress(location.hash);
  hideTip();
  const content = VIEWS[view]?.(page, name) ?? [
    heading("", "No such view", "The address names none. ", h("a", { href: href("overview") }, "Overview")),
  ];
  main.replaceChildren(h("div", { class: `view ${view}` }, content));
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.getAttribute("href") === href(MENU[view] ?? view);
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = main.querySelector("h1");
  document.title = `${title?.textContent ?? view} · ${page.title}`;
  if (!moved) return;
  scrollTo(0, 0);
  title?.focus({ preventScroll: true });
}

/** @param {string} id */
function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found;
}

start(readData());
