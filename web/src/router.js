// Addresses: #/view or #/view/name.

/**
 * @typedef {object} Address
 * @property {string} view
 * @property {string} name "" if the address has none
 */

/** Views by the names that readers type, too: the lists are called as the menu calls them. @type {Record<string, string>} */
const ALIASES = { bridge: "bridges", circuits: "circuit", channels: "channel" };

/**
 * The address that a location's hash names; the overview if it names none.
 * @param {string} hash
 * @returns {Address}
 */
export function parseAddress(hash) {
  if (!hash.startsWith("#/")) return { view: "overview", name: "" };
  const [view, ...rest] = hash.slice(2).split("/");
  return { view: ALIASES[view] ?? (view || "overview"), name: decode(rest.join("/")) };
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/**
 * The link to a view.
 * @param {string} view
 * @param {string} [name]
 */
export function href(view, name = "") {
  return `#/${view}${name ? `/${encodeURIComponent(name)}` : ""}`;
}
