// Elements in one expression. No style attributes: the page's policy forbids them; `vary` sets CSS variables.

/** @typedef {Node | string | number | null | undefined | false | Child[]} Child */
/** @typedef {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} Attributes */

/**
 * An HTML element. Attributes named `onclick` and the like take functions; null and false leave one out.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/**
 * An SVG element.
 * @template {keyof SVGElementTagNameMap} K
 * @param {K} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 * @returns {SVGElementTagNameMap[K]}
 */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/**
 * @template {Element} E
 * @param {E} element
 * @param {Attributes} attributes
 * @param {Child[]} children
 * @returns {E}
 */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  append(element, children);
  return element;
}

/**
 * @param {Element | DocumentFragment} element
 * @param {Child} child
 */
function append(element, child) {
  if (Array.isArray(child)) child.forEach((one) => append(element, one));
  else if (child !== null && child !== undefined && child !== false) {
    element.append(typeof child === "number" ? String(child) : child);
  }
}

/**
 * Set CSS variables of an element.
 * @template {HTMLElement | SVGElement} E
 * @param {E} element
 * @param {Record<string, number | string>} variables
 * @returns {E}
 */
export function vary(element, variables) {
  for (const [name, value] of Object.entries(variables)) element.style.setProperty(name, String(value));
  return element;
}

/**
 * The drawing of a plot at its container's width, drawn again when that changes.
 * @param {(width: number) => Element} draw
 * @param {string} [name] class of the container
 */
export function responsive(draw, name = "plot") {
  const box = h("div", { class: name });
  let width = 0;
  new ResizeObserver((entries) => {
    const now = Math.round(entries[0].contentRect.width);
    if (now === 0 || now === width) return;
    width = now;
    box.replaceChildren(draw(width));
  }).observe(box);
  return box;
}
