// One tooltip for the whole page.
import { h } from "./dom.js";

const tip = h("div", { class: "tooltip", role: "tooltip", hidden: true });

/** Put the tooltip into the page; Escape hides it. */
export function mountTooltip() {
  document.body.append(tip);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  addEventListener("scroll", hideTip, { passive: true });
}

/**
 * Show content beside an element, or whatever else has a box.
 * @param {Pick<Element, "getBoundingClientRect">} target
 * @param {import("./dom.js").Child[]} content
 */
export function showTip(target, content) {
  tip.replaceChildren(...h("div", {}, content).childNodes);
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const x = box.left + box.width / 2;
  const [top, bottom] = [box.top - 6, box.bottom + 6];
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x - width / 2), innerWidth - width - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${top - height > 8 ? top - height : bottom}px`;
}

/** Hide the tooltip. */
export function hideTip() {
  tip.hidden = true;
}

/**
 * The lines of a tooltip: a title, and names with their figures.
 * @param {import("./dom.js").Child} title
 * @param {[string, string][]} rows
 * @returns {import("./dom.js").Child[]}
 */
export function tipLines(title, rows) {
  return [
    h("strong", {}, title),
    h("table", {}, ...rows.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", { class: "number" }, value)))),
  ];
}
