// The JSON in the page, and what is looked up in it.

/** @typedef {import("./types.js").PageData} PageData */

/** @returns {PageData} */
export function readData() {
  const element = document.getElementById("data");
  const page = JSON.parse(element?.textContent ?? "null");
  if (page?.format !== 1) throw new Error(`this page reads data of format 1, not ${page?.format}`);
  return page;
}

/**
 * Offer the page's data as a file.
 * @param {PageData} page
 */
export function download(page) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(page)], { type: "application/json" }));
  link.download = "report-data.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/**
 * Every node that the page knows: channels first, then nodes of circuits alone.
 * @param {PageData} page
 */
export function allNodes(page) {
  const inCircuits = Object.values(page.circuits).flatMap((circuit) => circuit.nodes.map((node) => node.id));
  return [...new Set([...Object.keys(page.channels), ...inCircuits])];
}

/**
 * The circuits that a node is in, with its index there.
 * @param {PageData} page
 * @param {string} id
 */
export function circuitsOf(page, id) {
  return Object.values(page.circuits)
    .map((circuit) => ({ circuit, index: circuit.nodes.findIndex((node) => node.id === id) }))
    .filter(({ index }) => index >= 0);
}
