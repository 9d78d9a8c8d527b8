// P(target) over the strength of an edit, with every baseline: a plot and its key, which tells values and hides curves.
import { scaleLinear, scaleLog } from "d3-scale";
import { area, line } from "d3-shape";
import { curvesOf } from "../curves.js";
import { h, responsive, s } from "../dom.js";
import { num } from "../format.js";
import { choice, tableView } from "../ui.js";
import { canvas, logTicks, plain, xAxis, yAxis } from "./axes.js";

/** @typedef {import("../types.js").Sweep} Sweep */
/** @typedef {import("../curves.js").Curve} Curve */
/** @typedef {{top: number, right: number, bottom: number, left: number}} Margin */

const MARGIN = { top: 14, right: 14, bottom: 46, left: 44 };
const HEIGHT = 320;

/**
 * @param {Sweep} sweep
 * @param {string} name what is edited
 */
export function dosePlot(sweep, name) {
  const curves = curvesOf(sweep);
  const state = { at: sweep.strengths.length - 1, log: false, hidden: /** @type {Set<string>} */ (new Set()) };
  const key = doseKey(sweep, curves, (curve) => {
    if (!state.hidden.delete(curve)) state.hidden.add(curve);
    redraw();
    return state.hidden.has(curve);
  });
  let width = 0;
  const plot = responsive((w) => {
    width = w;
    return drawDose(sweep, curves, state, w, moved);
  });
  function redraw() {
    if (width) plot.replaceChildren(drawDose(sweep, curves, state, width, moved));
  }
  /** @param {number} at */
  function moved(at) {
    state.at = at;
    key.show(at);
  }
  const scale = choice(
    "scale",
    [
      ["linear", "linear"],
      ["log", "logarithmic"],
    ],
    "linear",
    (value) => {
      state.log = value === "log";
      redraw();
    },
  );
  key.show(state.at);
  return h(
    "div",
    { class: "dose" },
    h("div", { class: "dose-plot" }, plot, scale),
    key.element,
    tableView(`P(target), ${name}`, ["curve", ...sweep.strengths.map((x) => plain(x))], () =>
      curves.map((curve) => [curve.label, ...(sweep[curve.name] ?? []).map((p) => num(p))]),
    ),
  );
}

/**
 * The names of the curves, each a button that hides it, with their values at a strength.
 * @param {Sweep} sweep
 * @param {Curve[]} curves
 * @param {(name: string) => boolean} toggle tells whether the curve is hidden now
 */
function doseKey(sweep, curves, toggle) {
  const strength = h("span", {});
  const rows = curves.map((curve) => {
    const value = h("td", { class: "number" });
    const band = h("td", { class: "number quiet" });
    const swatch = s(
      "svg",
      { class: "swatch", width: 28, height: 10, "aria-hidden": "true" },
      s("line", { class: `curve ${curve.style}`, x1: 1, x2: 27, y1: 5, y2: 5 }),
    );
    const button = h(
      "button",
      { type: "button", "aria-pressed": "true", title: "Hide or show this curve" },
      swatch,
      h("span", {}, curve.label),
    );
    button.addEventListener("click", () => button.setAttribute("aria-pressed", String(!toggle(curve.name))));
    return {
      curve,
      value,
      band,
      element: h(
        "tr",
        { class: curve.style.startsWith("base") ? "quiet" : null },
        h("th", { scope: "row" }, button),
        value,
        band,
      ),
    };
  });
  const table = h(
    "table",
    { class: "dose-key" },
    h("caption", {}, "P(target) at ", strength, ", 95% band"),
    h(
      "thead",
      { class: "hidden" },
      h("tr", {}, ...["curve", "P(target)", "95% band"].map((x) => h("th", { scope: "col" }, x))),
    ),
    h("tbody", {}, ...rows.map((row) => row.element)),
  );
  /** @param {number} at index of a strength */
  function show(at) {
    strength.textContent = `strength ${plain(sweep.strengths[at])}`;
    for (const { curve, value, band } of rows) {
      value.textContent = num(sweep[curve.name]?.[at]);
      const bounds = sweep.bands?.[curve.name];
      band.textContent = bounds ? `${num(bounds.low[at], 2)}–${num(bounds.high[at], 2)}` : "";
    }
  }
  return { element: table, show };
}

/**
 * @param {Sweep} sweep
 * @param {Curve[]} curves
 * @param {{at: number, log: boolean, hidden: Set<string>}} state
 * @param {number} width
 * @param {(at: number) => void} moved
 */
function drawDose(sweep, curves, state, width, moved) {
  const shown = curves.filter((curve) => !state.hidden.has(curve.name));
  const { x, y, ticks } = doseScales(sweep, curves, state.log, width);
  const bottom = HEIGHT - MARGIN.bottom;
  const marker = s("g", { class: "marker" });
  const svg = canvas(
    width,
    HEIGHT,
    "P(target) over the strength of the edit",
    yAxis(y, ticks, [MARGIN.left, width - MARGIN.right], plain),
    xAxis(x, x.ticks(width < 420 ? 3 : 6), bottom, plain),
    s(
      "text",
      { class: "axis-name", x: MARGIN.left, y: HEIGHT - 8 },
      width < 420 ? "strength of the edit" : "strength of the edit (1: what the counterfactual prompt gives)",
    ),
    // A model gives the other answer where P(target) is over a half.
    s("line", { class: "half", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(0.5), y2: y(0.5) }),
    ...shown.toReversed().map((curve) => doseCurve(sweep, curve, x, y)),
    marker,
  );
  const mark = () => {
    const at = sweep.strengths[state.at];
    marker.replaceChildren(
      s("line", { x1: x(at), x2: x(at), y1: MARGIN.top, y2: bottom }),
      ...shown.map((curve) =>
        s("circle", { class: `dot ${curve.style}`, cx: x(at), cy: y(sweep[curve.name]?.[state.at] ?? 0), r: 3.5 }),
      ),
    );
  };
  mark();
  svg.append(strengthControl(sweep, state, x, width, bottom, () => (moved(state.at), mark())));
  return svg;
}

/**
 * @param {Sweep} sweep
 * @param {Curve[]} curves
 * @param {boolean} log
 * @param {number} width
 */
function doseScales(sweep, curves, log, width) {
  const { strengths } = sweep;
  const x = scaleLinear([Math.min(...strengths), Math.max(...strengths)], [MARGIN.left, width - MARGIN.right]);
  const range = [HEIGHT - MARGIN.bottom, MARGIN.top];
  if (!log) {
    const y = scaleLinear([0, 1], range);
    return { x, y, ticks: [0, 0.25, 0.5, 0.75, 1] };
  }
  const least = Math.min(...curves.flatMap((curve) => sweep[curve.name] ?? []).filter((p) => p > 0), 0.1);
  const low = 10 ** Math.floor(Math.log10(least));
  const y = scaleLog([low, 1], range).clamp(true);
  return { x, y, ticks: logTicks(low, 1) };
}

/**
 * @param {Sweep} sweep
 * @param {Curve} curve
 * @param {(x: number) => number} x
 * @param {(x: number) => number} y
 */
function doseCurve(sweep, curve, x, y) {
  const values = sweep[curve.name] ?? [];
  const bounds = sweep.bands?.[curve.name];
  const path = line(
    (_, i) => x(sweep.strengths[i]),
    (/** @type {number} */ p) => y(p),
  );
  const band =
    bounds &&
    area(
      (_, i) => x(sweep.strengths[i]),
      (_, i) => y(bounds.low[i]),
      (/** @type {number} */ p) => y(p),
    );
  return s(
    "g",
    { "data-curve": curve.name },
    band && s("path", { class: `band ${curve.style}`, d: band(bounds.high) }),
    s("path", { class: `curve ${curve.style}`, d: path(values) }),
  );
}

/**
 * The plot's area: the pointer or the arrow keys choose a strength.
 * @param {Sweep} sweep
 * @param {{at: number}} state
 * @param {((x: number) => number) & {invert: (x: number) => number}} x
 * @param {number} width
 * @param {number} bottom
 * @param {() => void} changed
 */
function strengthControl(sweep, state, x, width, bottom, changed) {
  const { strengths } = sweep;
  const hit = s("rect", {
    class: "hit",
    x: MARGIN.left,
    y: MARGIN.top,
    width: width - MARGIN.left - MARGIN.right,
    height: bottom - MARGIN.top,
    tabindex: 0,
    role: "slider",
    "aria-label": "strength",
    "aria-valuemin": strengths[0],
    "aria-valuemax": strengths[strengths.length - 1],
  });
  const set = (/** @type {number} */ at) => {
    state.at = Math.min(Math.max(at, 0), strengths.length - 1);
    hit.setAttribute("aria-valuenow", String(strengths[state.at]));
    hit.setAttribute(
      "aria-valuetext",
      `strength ${plain(strengths[state.at])}, P(target) ${num(sweep.p_target?.[state.at])}`,
    );
    changed();
  };
  hit.addEventListener("pointermove", (event) => {
    const box = hit.getBoundingClientRect();
    const value = x.invert(
      MARGIN.left + ((event.clientX - box.left) / box.width) * (width - MARGIN.left - MARGIN.right),
    );
    const distances = strengths.map((one) => Math.abs(one - value));
    set(distances.indexOf(Math.min(...distances)));
  });
  hit.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    set(Math.max(Math.min(state.at + step, strengths.length), 0));
  });
  set(state.at);
  return hit;
}
