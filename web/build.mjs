// Write bridges/report/assets/page.js and page.css from src/; the same bytes each time.
import { build } from "esbuild";
import { readFileSync, writeFileSync, existsSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(process.env.BRIDGES_PAGE_OUT ?? join(here, "../bridges/report/assets"));

/**
 * The licences of the packages in the bundle, equal texts once, as a comment.
 * @param {string[]} inputs the files that went in, relative to here
 */
function notices(inputs) {
  const packages = [...new Set(inputs.map((path) => /node_modules\/([^/]+)\//.exec(path)?.[1] ?? ""))].filter(Boolean);
  /** @type {Map<string, string[]>} */
  const texts = new Map();
  for (const name of packages.sort()) {
    const file = join(here, "node_modules", name, "LICENSE");
    if (!existsSync(file)) throw new Error(`${name} has no LICENSE file; leave it out of the bundle`);
    const text = readFileSync(file, "utf8").trim().replaceAll("*/", "* /");
    texts.set(text, [...(texts.get(text) ?? []), name]);
  }
  return [...texts].map(([text, names]) => `/* ${names.join(", ")}\n\n${text}\n*/\n`).join("");
}

const options = {
  bundle: true,
  minify: true,
  write: false,
  charset: "utf8",
  legalComments: "none",
  absWorkingDir: here,
};
const script = await build({
  ...options,
  entryPoints: ["src/main.js"],
  format: "iife",
  target: "es2022",
  metafile: true,
});
const style = await build({ ...options, entryPoints: ["src/css/page.css"] });
mkdirSync(out, { recursive: true });
const code = script.outputFiles[0].text + notices(Object.keys(script.metafile.inputs));
writeFileSync(join(out, "page.js"), code);
writeFileSync(join(out, "page.css"), style.outputFiles[0].text);
console.log(
  `page.js ${(code.length / 1000).toFixed(1)} kB, page.css ${(style.outputFiles[0].text.length / 1000).toFixed(1)} kB`,
);
