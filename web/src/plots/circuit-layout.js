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
 * The path of an edge; one that passes columns bows upwards, so that it does not run through their nodes.
 * @param {Layout} layout
 * @param {CEdge} edge
 */
export function edgePath(layout, edge) {
  const [a, b] = [layout.nodes[edge.source], layout.nodes[edge.target]];
  const bow = Math.min(Math.max(Math.abs(b.column - a.column) - 1, 0) * 16, 60);
  const middle = (a.x + b.x) / 2;
  const points = [a, { x: middle, y: a.y - bow }, { x: middle, y: b.y - bow }, b];
  const [start, ...rest] = points.map(({ x, y }) => `${round(x)},${round(y)}`);
  return `M${start}C${rest.join(" ")}`;
}

/**
 * Where the middle of an edge's path is.
 * @param {Layout} layout
 * @param {CEdge} edge
 */
export function edgeMiddle(layout, edge) {
  const [a, b] = [layout.nodes[edge.source], layout.nodes[edge.target]];
  const bow = Math.min(Math.max(Math.abs(b.column - a.column) - 1, 0) * 16, 60);
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 - 0.75 * bow };
}

/** @param {number} x */
function round(x) {
  return Math.round(x * 10) / 10;
}
