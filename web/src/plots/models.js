// Both models' streams with their sites in order, and a bridge at each that spans as much as it explains.
import { h, responsive, s } from "../dom.js";
import { count, num } from "../format.js";
import { hideTip, showTip, tipLines } from "../tooltip.js";
import { scroller, tableView } from "../ui.js";
import { canvas } from "./axes.js";

/** @typedef {import("../types.js").PageData} PageData */
/** @typedef {import("../types.js").Site} Site */

const LEAST_STEP = 58;
/** Room that a site needs for its figures beside its bridge, and for the names of their controls too. */
const [FIGURES, CONTROL_NAMES] = [100, 172];
const [TOP, GAP] = [58, 140];
const ROWS = /** @type {const} */ ([
  ["dense → sparse", "kl_dense_to_sparse", "kl_dense_to_sparse_mean_ablation"],
  ["sparse → dense", "kl_sparse_to_dense", "kl_sparse_to_dense_mean_ablation"],
]);

/** @param {PageData} page */
export function modelPicture(page) {
  const { sites } = page.bridges;
  const names = ["site, dense ⇄ sparse", ...bridgeRows(sites[0]).map(([name]) => name)];
  return h(
    "div",
    {},
    scroller(
      "The two models and their bridges",
      responsive((width) => drawModels(page, width)),
    ),
    tableView("sites and bridges", names, () =>
      sites.map((site) => [`${site.dense_site} ⇄ ${site.name}`, ...bridgeRows(site).map(([, value]) => value)]),
    ),
  );
}

/** @param {import("./../types.js").Model} model */
function modelLine(model) {
  const nonzero = model.nonzeros === null ? "" : `, ${count(model.nonzeros)} of them not zero`;
  return `${model.layers} layers · width ${count(model.width)} · ${count(model.parameters)} parameters${nonzero}`;
}

/**
 * @param {PageData} page
 * @param {number} available
 */
function drawModels(page, available) {
  const { sites } = page.bridges;
  const step = Math.max(LEAST_STEP, available / sites.length);
  const width = Math.max(available, step * sites.length);
  const bottom = TOP + GAP;
  const narrow = step < FIGURES;
  const streams = /** @type {const} */ ([
    ["dense", TOP, 14],
    ["sparse", bottom, bottom + 52],
  ]).map(([side, y, label]) => {
    const model = page.models[side];
    return [
      s("line", { class: `stream ${side}`, x1: 0, x2: width, y1: y, y2: y }),
      s("path", { class: `arrow ${side}`, d: `M${width - 9},${y - 5}L${width},${y}L${width - 9},${y + 5}` }),
      s(
        "text",
        { class: "model-name", x: 0, y: label },
        s("tspan", { class: `strong ${side}` }, `${side === "dense" ? "Dense" : "Sparse"} model`),
        available > 640 && s("tspan", { class: "quiet", dx: 10 }, `${model.name} · ${modelLine(model)}`),
      ),
    ];
  });
  const columns = sites.map((site, i) => siteBridge(site, (i + 0.5) * step, step));
  const names = [
    s(
      "text",
      { class: "row-name", x: 0, y: bottom + 96 },
      available > 640
        ? "KL of a pass that changes models here, nats per token; in quieter tone with the stream at its mean"
        : "KL of a pass that changes models here, and its control",
    ),
  ];
  return canvas(
    width,
    bottom + (narrow ? 192 : 150),
    "The models' streams, from left to right, with a bridge at every site",
    streams,
    names,
    columns,
  );
}

/**
 * @param {Site} site
 * @param {number} x
 * @param {number} step
 */
function siteBridge(site, x, step) {
  const narrow = step < FIGURES;
  const named = (/** @type {string} */ name) => (step < CONTROL_NAMES ? "" : `${name} `);
  const bottom = TOP + GAP;
  const [left, right] = [x - 11, x + 11];
  // A figure that is undefined, null, spans nothing.
  const reach = (/** @type {number | null} */ nmse) => (nmse === null ? 0 : GAP * Math.min(Math.max(1 - nmse, 0), 1));
  const group = s(
    "g",
    { class: "bridge" },
    s("rect", { class: "back", x: x - step / 2, y: TOP - 12, width: step, height: GAP + 24 }),
    s("line", { class: "span", x1: left, x2: left, y1: TOP, y2: bottom }),
    s("line", { class: "span", x1: right, x2: right, y1: TOP, y2: bottom }),
    s("line", { class: "reach dense", x1: left, x2: left, y1: TOP, y2: TOP + reach(site.nmse_encode) }),
    s("line", {
      class: "floor",
      x1: left - 6,
      x2: left + 6,
      y1: TOP + reach(site.nmse_encode_floor),
      y2: TOP + reach(site.nmse_encode_floor),
    }),
    s("line", { class: "reach sparse", x1: right, x2: right, y1: bottom, y2: bottom - reach(site.nmse_decode) }),
    s("circle", { class: "stop dense", cx: x, cy: TOP, r: 4.5 }),
    s("circle", { class: "stop sparse", cx: x, cy: bottom, r: 4.5 }),
    s("text", { class: "site-name", x, y: TOP - 14, "text-anchor": "middle" }, site.dense_site),
    s("text", { class: "site-name", x, y: bottom + 24, "text-anchor": "middle" }, site.name),
    !narrow &&
      s(
        "text",
        { class: "nmse dense", x: left - 12, y: TOP + GAP / 2, "text-anchor": "end" },
        num(site.nmse_encode, 2),
        s(
          "tspan",
          { class: "quiet", x: left - 12, dy: "1.25em" },
          `${named("floor")}${num(site.nmse_encode_floor, 2)}`,
        ),
      ),
    !narrow &&
      s(
        "text",
        { class: "nmse sparse", x: right + 12, y: TOP + GAP / 2 },
        num(site.nmse_decode, 2),
        s(
          "tspan",
          { class: "quiet", x: right + 12, dy: "1.25em" },
          `${named("shuffled")}${num(site.nmse_decode_shuffled, 1)}`,
        ),
      ),
    ...ROWS.map(([name, key, control], i) => [
      s(
        "text",
        { class: `kl ${i ? "sparse" : "dense"}`, x, y: bottom + 120 + (narrow ? 42 : 21) * i, "text-anchor": "middle" },
        i ? "↑ " : "↓ ",
        num(site[key], 2),
        s("tspan", { class: "quiet", ...(narrow ? { x, dy: "1.25em" } : { dx: 6 }) }, num(site[control], 1)),
      ),
    ]),
  );
  group.addEventListener("mouseenter", () =>
    showTip(group, tipLines(`${site.dense_site} ⇄ ${site.name}`, bridgeRows(site))),
  );
  group.addEventListener("mouseleave", hideTip);
  return group;
}

/**
 * @param {Site} site
 * @returns {[string, string][]}
 */
function bridgeRows(site) {
  return [
    ["width, dense / sparse", `${count(site.d_dense)} / ${count(site.d_sparse)}`],
    ["kept by AbsTopK", count(site.k)],
    ["NMSE encode (floor)", `${num(site.nmse_encode)} (${num(site.nmse_encode_floor)})`],
    ["NMSE decode (shuffled)", `${num(site.nmse_decode)} (${num(site.nmse_decode_shuffled)})`],
    ...ROWS.map(
      ([name, key, control]) =>
        /** @type {[string, string]} */ ([`KL ${name} (mean)`, `${num(site[key])} (${num(site[control])})`]),
    ),
  ];
}
