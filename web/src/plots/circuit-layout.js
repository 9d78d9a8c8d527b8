// Where a circuit's nodes and edges go: columns from left to right, in a column by order, none over another.

/** @typedef {import("../types.js").Circuit} Circuit */
/** @typedef {import("../types.js").CEdge} CEdge */

/**
 * @typedef {object} Layout
 * @property {number} width
 * @property {number} height
 * @property {{x: number, lines: string[]}[]} columns
 * @property {{x: number, y: number, column: number}[]} nodes as the circuit's nodes; column counts those drawn
 * @property {number} spacing least distance of two nodes in a column
 */

const LEAST_COLUMN = 74;
const TOP = 64;
const SIDE = 46;
const CHARACTER = 6.3;

/**
 * @param {Circuit} circuit
 * @param {number} available width there is; more is used if there are many columns
 * @returns {Layout}
 */
export function circuitLayout(circuit, available) {
  const used = circuit.columns
    .map((column, i) => ({ column, members: membersOf(circuit, i) }))
    .filter((one) => one.members.length);
  const step = Math.max(LEAST_COLUMN, (available - 2 * SIDE) / Math.max(used.length - 1, 1));
  const most = Math.max(1, ...used.map((one) => one.members.length));
  const spacing = most <= 5 ? 74 : most <= 40 ? 22 : 14;
  const height = Math.max(most * spacing, 60);
  /** @type {Layout["nodes"]} */
  const nodes = new Array(circuit.nodes.length);
  const columns = used.map(({ column, members }, at) => {
    const x = SIDE + (used.length === 1 ? (available - 2 * SIDE) / 2 : at * step);
    const ys = spread(
      members.map((i) => circuit.nodes[i].order * height),
      spacing,
      height,
    );
    members.forEach((i, rank) => (nodes[i] = { x, y: TOP + 20 + ys[rank], column: at }));
    return { x, lines: wrap(column.label, Math.floor((step - 8) / CHARACTER)) };
  });
  return {
    width: Math.max(available, 2 * SIDE + step * (used.length - 1)),
    height: TOP + height + (spacing > 40 ? 60 : 40),
    columns,
    nodes,
    spacing,
  };
}

/**
 * A column's nodes from top to bottom.
 * @param {Circuit} circuit
 * @param {number} column
 */
function membersOf(circuit, column) {
  const members = circuit.nodes.map((_, i) => i).filter((i) => circuit.nodes[i].column === column);
  return members.sort((a, b) => circuit.nodes[a].order - circuit.nodes[b].order);
}

/**
 * Move sorted places apart until no two are closer than `spacing`, within 0 to `height`.
 * @param {number[]} places
 * @param {number} spacing
 * @param {number} height
 */
function spread(places, spacing, height) {
  const moved = [...places];
  for (let i = 1; i < moved.length; i += 1) moved[i] = Math.max(moved[i], moved[i - 1] + spacing);
  let limit = height;
  for (let i = moved.length - 1; i >= 0; i -= 1) {
    moved[i] = Math.min(moved[i], limit);
    limit = moved[i] - spacing;
  }
  return moved;
}

/**
 * Words in lines of at most so many characters.
 * @param {string} text
 * @param {number} most
 */
export function wrap(text, most) {
  /** @type {string[]} */
  const lines = [];
  for (const word of text.split(" ")) {
    const end = lines.at(-1);
    if (end !== undefined && end.length + word.length + 1 <= most) lines[lines.length - 1] = `${end} ${word}`;
    else lines.push(word);
  }
  return lines;
}

/**
 * The four points of an edge's cubic curve; one that passes columns bows upwards, so that it does not run through
 * their nodes.
 * @param {Layout} layout
 * @param {CEdge} edge
 */
function curvePoints(layout, edge) {
  const [a, b] = [layout.nodes[edge.source], layout.nodes[edge.target]];
  const bow = Math.min(Math.max(Math.abs(b.column - a.column) - 1, 0) * 16, 60);
  const middle = (a.x + b.x) / 2;
  return [a, { x: middle, y: a.y - bow }, { x: middle, y: b.y - bow }, b];
}

/**
 * The path of an edge.
 * @param {Layout} layout
 * @param {CEdge} edge
 */
export function edgePath(layout, edge) {
  const [start, ...rest] = curvePoints(layout, edge).map(({ x, y }) => `${round(x)},${round(y)}`);
  return `M${start}C${rest.join(" ")}`;
}

/**
 * Where the middle of an edge's path is.
 * @param {Layout} layout
 * @param {CEdge} edge
 */
export function edgeMiddle(layout, edge) {
  const [a, b, c, d] = curvePoints(layout, edge);
  return { x: (a.x + d.x) / 2, y: (a.y + 3 * b.y + 3 * c.y + d.y) / 8 };
}

/**
 * About how far an edge's path passes from a point: its distance along y, shortened by the path's slope there.
 * Infinite where the point is left or right of the path.
 * @param {Layout} layout
 * @param {CEdge} edge
 * @param {number} x
 * @param {number} y
 */
export function edgeDistance(layout, edge, x, y) {
  const [a, b, c, d] = curvePoints(layout, edge);
  const share = (x - a.x) / (d.x - a.x);
  if (!(share >= 0 && share <= 1)) return Infinity;
  const t = parameterAt(share);
  const u = 1 - t;
  const dy = 3 * (u * u * (b.y - a.y) + 2 * u * t * (c.y - b.y) + t * t * (d.y - c.y));
  const dx = 1.5 * (d.x - a.x) * (1 - 2 * t * u);
  return Math.abs(u * u * u * a.y + 3 * u * u * t * b.y + 3 * u * t * t * c.y + t * t * t * d.y - y) / Math.hypot(1, dy / dx);
}

/**
 * The parameter at which an edge's curve has gone this share of its way along x, by Newton's method: as both inner
 * points are in the middle, the share is 1.5 t - 1.5 t² + t³, which grows with t.
 * @param {number} share 0 to 1
 */
function parameterAt(share) {
  let t = share;
  for (let i = 0; i < 4; i += 1) t -= (1.5 * t - 1.5 * t * t + t * t * t - share) / (1.5 - 3 * t + 3 * t * t);
  return t;
}

/** @param {number} x */
function round(x) {
  return Math.round(x * 10) / 10;
}
