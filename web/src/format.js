// Numbers, tokens and names as people read them.

const MISSING = "–";

/**
 * A figure with so many decimals; with three or more of them, very small ones as 1.1e−5.
 * @param {number | null | undefined} x
 * @param {number} [decimals]
 */
export function num(x, decimals = 3) {
  if (x === null || x === undefined || !Number.isFinite(x)) return MISSING;
  const size = Math.abs(x);
  const text =
    decimals >= 3 && size > 0 && size < 0.5 * 10 ** -decimals
      ? size.toExponential(1).replace("e-", "e−")
      : size >= 10000
        ? size.toLocaleString("en-US", { maximumFractionDigits: 0 })
        : size.toFixed(decimals);
  // What rounds to zero has no sign.
  return x < 0 && /[1-9]/.test(text) ? `−${text}` : text;
}

/**
 * With its sign, as weights and changes are.
 * @param {number | null | undefined} x
 * @param {number} [decimals]
 */
export function signed(x, decimals = 3) {
  const text = num(x, decimals);
  return x !== null && x !== undefined && x > 0 && /[1-9]/.test(text) ? `+${text}` : text;
}

/**
 * A share as a percentage; with decimals under 10 and over 90, where they say something.
 * @param {number | null | undefined} x
 */
export function percent(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return MISSING;
  const value = 100 * x;
  if (Math.abs(value - Math.round(value)) < 1e-9) return `${value.toFixed(0)}%`;
  const decimals = value < 10 ? 2 : value > 90 ? 1 : 0;
  return `${value.toFixed(decimals)}%`;
}

/**
 * A whole number with its thousands apart.
 * @param {number | null | undefined} x
 */
export function count(x) {
  return x === null || x === undefined ? MISSING : x.toLocaleString("en-US");
}

/**
 * A number and its noun.
 * @param {number} n
 * @param {string} noun
 * @param {string} [plural]
 */
export function many(n, noun, plural = `${noun}s`) {
  return `${count(n)} ${n === 1 ? noun : plural}`;
}

/**
 * A token with its spaces and line breaks made visible.
 * @param {string} token
 */
export function visible(token) {
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/**
 * The channels of a sweep as a list.
 * @param {import("./types.js").Sweep} sweep
 */
export function channelsOf(sweep) {
  return Array.isArray(sweep.channel) ? sweep.channel : [sweep.channel];
}

/**
 * The nodes that a sweep edits.
 * @param {import("./types.js").Sweep} sweep
 */
export function nodesOf(sweep) {
  return channelsOf(sweep).map((channel) => `${sweep.site}.read.${channel}`);
}

/** @type {Record<string, string>} */
const KINDS = { q: "query", k: "key", v: "value", neuron: "neuron", read: "channel", write: "channel" };
/** @type {Record<string, string>} */
const SUBLAYERS = { attn: "attention", mlp: "MLP" };

/**
 * What a node is, in words: "channel 559, as the attention of layer 1 reads it".
 * @param {string} id
 */
export function describeNode(id) {
  const token = /^token ([\s\S]*)$/.exec(id);
  if (token) return `the token ${visible(token[1])}`;
  const final = /^final\.read\.(\d+)$/.exec(id);
  if (final) return `channel ${final[1]}, as the unembedding reads it`;
  const parts = /^(\d+)\.(\w+)\.(\w+)\.(\d+)$/.exec(id);
  if (!parts) return id;
  const [, layer, sublayer, kind, index] = parts;
  const where = `the ${SUBLAYERS[sublayer] ?? sublayer} of layer ${layer}`;
  if (kind === "read") return `channel ${index}, as ${where} reads it`;
  if (kind === "write") return `channel ${index}, as ${where} writes it`;
  return `${KINDS[kind] ?? kind} ${index} in ${where}`;
}
