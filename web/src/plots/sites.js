// A figure of the bridges per site in both directions, with the control of each: dots, and quieter marks.
import { scaleLinear, scaleLog, scalePoint } from "d3-scale";
import { h, responsive, s } from "../dom.js";
import { num } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { tableView } from "../ui.js";
import { canvas, logTicks, plain, yAxis } from "./axes.js";

/** @typedef {import("../types.js").Site} Site */
/**
 * @typedef {object} Series
 * @property {string} label
 * @property {string} style
 * @property {keyof Site} key
 * @property {keyof Site} [control]
 * @property {string} [controlLabel]
 * @property {keyof Site} [error] its standard error
 */

/**
 * @typedef {object} Panel
 * @property {string} title
 * @property {string} unit
 * @property {Series[]} series
 * @property {boolean} [log]
 * @property {{value: number, label: string}} [rule] a line across
 */

const HEIGHT = 270;
const MARGIN = { top: 12, right: 8, bottom: 34, left: 46 };
const BESIDE = 5;

/**
 * @param {Panel} panel
 * @param {Site[]} sites
 * @param {(site: Site | null) => void} over told which site the pointer is over
 * @returns {{element: HTMLElement, highlight: (site: Site | null) => void}}
 */
export function sitePanel(panel, sites, over) {
  /** @type {Map<Site, SVGElement>} */
  const groups = new Map();
  const plot = responsive((width) => drawPanel(panel, sites, groups, width, over));
  const keys = panel.series.map((one) => h("span", { class: `key ${one.style}` }, one.label));
  const controls = [...new Set(panel.series.flatMap((one) => one.controlLabel ?? []))];
  const columns = panel.series.flatMap((one) =>
    one.control ? [one, { ...one, key: one.control, label: `${one.label}: ${one.controlLabel}` }] : [one],
  );
  const element = h(
    "figure",
    { class: "panel" },
    h("figcaption", {}, h("strong", {}, panel.title), h("span", { class: "quiet" }, panel.unit)),
    plot,
    h(
      "p",
      { class: "keys" },
      ...keys,
      controls.length > 0 && h("span", { class: "key control" }, `control: ${controls.join("; ")}`),
      panel.rule &&
        h(
          "span",
          { class: "key rule" },
          `${panel.rule.label}, ${num(panel.rule.value, panel.rule.value === 1 ? 0 : 3)}`,
        ),
    ),
    tableView(panel.title, ["site", ...columns.map((one) => one.label)], () =>
      sites.map((site) => [site.name, ...columns.map((one) => num(/** @type {number} */ (site[one.key])))]),
    ),
  );
  const highlight = (/** @type {Site | null} */ site) => {
    for (const [one, group] of groups) group.classList.toggle("on", one === site);
  };
  return { element, highlight };
}

/**
 * @param {Panel} panel
 * @param {Site[]} sites
 * @param {Map<Site, SVGElement>} groups
 * @param {number} width
 * @param {(site: Site | null) => void} over
 */
function drawPanel(panel, sites, groups, width, over) {
  const x = scalePoint(
    sites.map((site) => site.name),
    [MARGIN.left, width - MARGIN.right],
  ).padding(0.6);
  const { y, ticks } = panelScale(panel, sites);
  const bottom = HEIGHT - MARGIN.bottom;
  const many = x.step() < 40;
  const columns = sites.map((site, i) => {
    const center = x(site.name) ?? 0;
    const half = x.step() / 2;
    const group = s(
      "g",
      { class: "site" },
      s("rect", { class: "back", x: center - half, y: MARGIN.top, width: 2 * half, height: HEIGHT - MARGIN.top }),
      ...panel.series.map((one, at) =>
        siteMarks(one, site, center + (at - (panel.series.length - 1) / 2) * Math.min(2 * BESIDE, half), y),
      ),
      (!many || i % Math.ceil(40 / x.step()) === 0) &&
        s("text", { class: "label", x: center, y: bottom + 20, "text-anchor": "middle" }, site.name),
    );
    group.addEventListener("mouseenter", () => {
      over(site);
      showTip(group, tipLines(site.name, siteRows(panel, site)));
    });
    group.addEventListener("mouseleave", () => (over(null), hideTip()));
    groups.set(site, group);
    return group;
  });
  const rule =
    panel.rule &&
    s("line", {
      class: "half",
      x1: MARGIN.left,
      x2: width - MARGIN.right,
      y1: y(panel.rule.value),
      y2: y(panel.rule.value),
    });
  return canvas(
    width,
    HEIGHT,
    `${panel.title} per site`,
    yAxis(y, ticks, [MARGIN.left, width - MARGIN.right], plain),
    ...columns,
    rule,
  );
}

/**
 * @param {Series} one
 * @param {Site} site
 * @param {number} x
 * @param {(x: number) => number} y
 */
function siteMarks(one, site, x, y) {
  const value = /** @type {number | null} */ (site[one.key]);
  const control = one.control && /** @type {number | null} */ (site[one.control]);
  const error = one.error && /** @type {number | null} */ (site[one.error]);
  return [
    typeof control === "number" &&
      s("line", { class: "control-mark", x1: x - 6, x2: x + 6, y1: y(control), y2: y(control) }),
    typeof value === "number" &&
      typeof error === "number" &&
      s("line", { class: `error ${one.style}`, x1: x, x2: x, y1: y(value - 2 * error), y2: y(value + 2 * error) }),
    typeof value === "number" && s("circle", { class: `dot ${one.style}`, cx: x, cy: y(value), r: 4.5 }),
  ];
}

/**
 * @param {Panel} panel
 * @param {Site} site
 * @returns {[string, string][]}
 */
function siteRows(panel, site) {
  return panel.series.flatMap((one) => {
    const error = one.error && /** @type {number | null} */ (site[one.error]);
    /** @type {[string, string][]} */
    const rows = [
      [one.label, num(/** @type {number} */ (site[one.key])) + (typeof error === "number" ? ` ± ${num(error)}` : "")],
    ];
    if (one.control) rows.push([one.controlLabel ?? "control", num(/** @type {number} */ (site[one.control]))]);
    return rows;
  });
}

/**
 * @param {Panel} panel
 * @param {Site[]} sites
 */
function panelScale(panel, sites) {
  const keys = panel.series.flatMap((one) => (one.control ? [one.key, one.control] : [one.key]));
  const values = sites.flatMap((site) => keys.map((key) => /** @type {number} */ (site[key]))).filter(Number.isFinite);
  const range = [HEIGHT - MARGIN.bottom, MARGIN.top];
  const all = panel.rule ? [...values, panel.rule.value] : values;
  if (panel.log) {
    const positive = all.filter((value) => value > 0);
    const [low, high] = [Math.min(...positive, 1) / 1.5, Math.max(...positive, 0.01) * 1.3];
    return { y: scaleLog([low, high], range).clamp(true), ticks: logTicks(low, high) };
  }
  const y = scaleLinear([Math.min(0, ...all), Math.max(1, ...all)], range).nice();
  return { y, ticks: y.ticks(5) };
}
