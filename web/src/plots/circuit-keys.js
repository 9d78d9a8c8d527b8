// One node of a graph is in the tab order; arrow keys move to the nearest one in their direction.

/**
 * @param {SVGAElement[]} nodes
 * @param {import("./circuit-layout.js").Layout} layout
 */
export function mountArrowKeys(nodes, layout) {
  nodes.forEach((node, i) =>
    node.addEventListener("keydown", (event) => {
      const next = neighbour(layout.nodes, i, event.key);
      if (next === undefined) return;
      event.preventDefault();
      if (next < 0) return;
      nodes.forEach((one, at) => one.setAttribute("tabindex", at === next ? "0" : "-1"));
      nodes[next].focus();
    }),
  );
}

/**
 * The node that a key leads to; undefined if the key is none of these, -1 if there is no node there.
 * @param {{y: number, column: number}[]} places
 * @param {number} i
 * @param {string} key
 */
function neighbour(places, i, key) {
  const here = places[i];
  const indices = places.map((_, at) => at);
  if (key === "ArrowUp" || key === "ArrowDown") {
    const sign = key === "ArrowDown" ? 1 : -1;
    const there = indices.filter((at) => places[at].column === here.column && sign * (places[at].y - here.y) > 0);
    return nearest(places, there, here.y);
  }
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const column = here.column + (key === "ArrowRight" ? 1 : -1);
    return nearest(
      places,
      indices.filter((at) => places[at].column === column),
      here.y,
    );
  }
  return undefined;
}

/**
 * @param {{y: number}[]} places
 * @param {number[]} candidates
 * @param {number} y
 */
function nearest(places, candidates, y) {
  return candidates.reduce(
    (best, at) => (best < 0 || Math.abs(places[at].y - y) < Math.abs(places[best].y - y) ? at : best),
    -1,
  );
}
