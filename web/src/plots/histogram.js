// A node's values where it is not zero, with their percentiles over them.
import { scaleLinear } from "d3-scale";
import { responsive, s } from "../dom.js";
import { count, num } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { canvas, plain, xAxis } from "./axes.js";

const HEIGHT = 190;
const MARGIN = { top: 30, right: 10, bottom: 26, left: 10 };

/**
 * @param {{edges: number[], counts: number[]}} histogram
 * @param {Record<string, number>} percentiles
 */
export function histogramPlot({ edges, counts }, percentiles) {
  return responsive((width) => {
    const x = scaleLinear([edges[0], edges[edges.length - 1]], [MARGIN.left, width - MARGIN.right]);
    const y = scaleLinear([0, Math.max(...counts, 1)], [HEIGHT - MARGIN.bottom, MARGIN.top]);
    const bars = counts.map((n, i) => {
      const middle = (edges[i] + edges[i + 1]) / 2;
      const bar = s("rect", {
        class: middle < 0 ? "column negative" : "column",
        x: x(edges[i]) + 0.5,
        width: Math.max(x(edges[i + 1]) - x(edges[i]) - 1, 0.5),
        // What is counted at all is seen.
        y: n ? Math.min(y(n), y(0) - 1) : y(0),
        height: n ? Math.max(y(0) - y(n), 1) : 0,
      });
      const hit = s("rect", {
        class: "back",
        x: x(edges[i]),
        width: x(edges[i + 1]) - x(edges[i]),
        y: MARGIN.top,
        height: HEIGHT - MARGIN.top - MARGIN.bottom,
      });
      const group = s("g", { class: "bin" }, hit, bar);
      group.addEventListener("mouseenter", () =>
        showTip(bar, tipLines(`${num(edges[i], 2)} to ${num(edges[i + 1], 2)}`, [["tokens", count(n)]])),
      );
      group.addEventListener("mouseleave", hideTip);
      return group;
    });
    return canvas(
      width,
      HEIGHT,
      "Histogram of the node's values where it is not zero",
      bars,
      s("line", { class: "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(0), y2: y(0) }),
      edges[0] < 0 &&
        edges[edges.length - 1] > 0 &&
        s("line", { class: "zero", x1: x(0), x2: x(0), y1: MARGIN.top, y2: y(0) + 5 }),
      boxLine(percentiles, x),
      xAxis(x, x.ticks(width < 420 ? 4 : 8), HEIGHT - MARGIN.bottom, plain),
    );
  });
}

/**
 * A line from the 5th to the 95th percentile, thick in the middle half, with a mark at the median.
 * @param {Record<string, number>} percentiles
 * @param {(x: number) => number} x
 */
function boxLine(percentiles, x) {
  const [p5, p25, p50, p75, p95] = ["5", "25", "50", "75", "95"].map((key) => percentiles[key]);
  if (![p5, p25, p50, p75, p95].every(Number.isFinite)) return null;
  const y = 14;
  const group = s(
    "g",
    { class: "box" },
    s("line", { class: "whisker", x1: x(p5), x2: x(p95), y1: y, y2: y }),
    s("line", { class: "middle", x1: x(p25), x2: x(p75), y1: y, y2: y }),
    s("circle", { cx: x(p50), cy: y, r: 4 }),
  );
  group.addEventListener("mouseenter", () =>
    showTip(
      group,
      tipLines("where it is not zero", [
        ["5–95%", `${num(p5)} to ${num(p95)}`],
        ["25–75%", `${num(p25)} to ${num(p75)}`],
        ["median", num(p50)],
      ]),
    ),
  );
  group.addEventListener("mouseleave", hideTip);
  return group;
}
