// Axes of plots.
import { s } from "../dom.js";

/** @typedef {(x: number) => number} Scale */

/**
 * Horizontal lines with their values at the left.
 * @param {Scale} y
 * @param {number[]} ticks
 * @param {[number, number]} range where the lines start and end
 * @param {(x: number) => string} format
 */
export function yAxis(y, ticks, [left, right], format) {
  return s(
    "g",
    { class: "axis" },
    ...ticks.map((tick) => [
      s("line", { x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      s("text", { x: left - 8, y: y(tick), dy: "0.32em", "text-anchor": "end" }, format(tick)),
    ]),
  );
}

/**
 * Values under a plot.
 * @param {Scale} x
 * @param {number[]} ticks
 * @param {number} y
 * @param {(x: number) => string} format
 */
export function xAxis(x, ticks, y, format) {
  return s(
    "g",
    { class: "axis" },
    ...ticks.map((tick) => s("text", { x: x(tick), y: y + 18, "text-anchor": "middle" }, format(tick))),
  );
}

/**
 * The root of a plot: as wide as its container, and no wider on paper.
 * @param {number} width
 * @param {number} height
 * @param {string} label
 * @param {...import("../dom.js").Child} children
 */
export function canvas(width, height, label, ...children) {
  return s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label },
    ...children,
  );
}

/**
 * Powers of ten, and two and five times them where there are few.
 * @param {number} low
 * @param {number} high
 */
export function logTicks(low, high) {
  const steps = Math.log10(high / low) > 2.2 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    ticks.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(1))));
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

/**
 * A tick without zeros that say nothing.
 * @param {number} x
 */
export function plain(x) {
  return String(Number(x.toPrecision(3))).replace("-", "−");
}
