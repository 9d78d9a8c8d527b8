// A table that its headers sort.
import { h } from "./dom.js";
import { scroller } from "./ui.js";

/**
 * @template R
 * @typedef {object} Column
 * @property {string} label
 * @property {string} [note] a quieter word under the label: what its control is
 * @property {(row: R) => import("./dom.js").Child} cell
 * @property {(row: R) => number | string | null | undefined} value what it is sorted by
 * @property {boolean} [text] not a number
 */

/**
 * @template R
 * @typedef {object} TableOptions
 * @property {string} caption
 * @property {Column<R>[]} columns the first names the row
 * @property {R[]} rows
 * @property {(row: R) => string} [link] a click anywhere on a row goes there; the first cell should hold the link too
 * @property {(row: R) => void} [over] the pointer is over a row
 * @property {R[]} [last] rows that stay last: means
 */

/**
 * @template R
 * @param {TableOptions<R>} options
 * @returns {{element: HTMLElement, rowOf: (row: R) => HTMLElement | undefined}}
 */
export function sortable({ caption, columns, rows, link, over, last = [] }) {
  const elements = new Map([...rows, ...last].map((row) => [row, tableRow(row)]));
  const body = h("tbody");
  const headers = columns.map((column, i) =>
    h(
      "th",
      { scope: "col", class: column.text ? "text" : null },
      h(
        "button",
        { type: "button", onclick: () => sort(i) },
        column.label,
        column.note && h("span", { class: "quiet" }, column.note),
      ),
    ),
  );
  /** @type {[number, boolean]} */
  let order = [-1, false];

  /** @param {number} i */
  function sort(i) {
    // Numbers start with the largest, text with a.
    const first = !columns[i].text;
    const descending = order[0] === i ? !order[1] : first;
    order = [i, descending];
    headers.forEach((header, at) => {
      if (at === i) header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else header.removeAttribute("aria-sort");
    });
    show(rows.toSorted((a, b) => compare(columns[i].value(a), columns[i].value(b), descending)));
  }

  /** @param {R[]} sorted */
  function show(sorted) {
    body.replaceChildren(...[...sorted, ...last].map((row) => /** @type {HTMLElement} */ (elements.get(row))));
  }

  /** @param {R} row */
  function tableRow(row) {
    const cells = columns.map((column, i) =>
      i === 0
        ? h("th", { scope: "row" }, column.cell(row))
        : h("td", { class: column.text ? "text" : "number" }, column.cell(row)),
    );
    const element = h("tr", { class: last.includes(row) ? "mean" : link && "linked" }, ...cells);
    if (link && !last.includes(row)) element.addEventListener("click", (event) => follow(event, link(row)));
    if (over) element.addEventListener("mouseenter", () => over(row));
    return element;
  }

  show(rows);
  const table = h(
    "table",
    { class: "sortable" },
    h("caption", {}, h("span", {}, caption)),
    h("thead", {}, h("tr", {}, ...headers)),
    body,
  );
  return { element: scroller(caption, table), rowOf: (row) => elements.get(row) };
}

/**
 * @param {MouseEvent} event
 * @param {string} address
 */
function follow(event, address) {
  const onLink = event.target instanceof Element && event.target.closest("a, button");
  if (!onLink && !getSelection()?.toString()) location.hash = address;
}

/**
 * Order two values; what is missing comes last either way.
 * @param {number | string | null | undefined} a
 * @param {number | string | null | undefined} b
 * @param {boolean} descending
 */
function compare(a, b, descending) {
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1;
  if (b === null || b === undefined) return -1;
  const order = typeof a === "string" ? a.localeCompare(String(b), "en", { numeric: true }) : a - Number(b);
  return descending ? -order : order;
}
