// node browser.mjs onnxruntime|transformers wasm|webgpu CHROMIUM NODE_MODULES REQUEST.json RESULT.json PICTURE.png
// Lets a page in headless Chromium play a folder, and asks it for the answer.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { serve, visit } from "./chromium.mjs";

const [client, device, chromium, modules, requestPath, resultPath, picture] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
// transformers.js brings an onnxruntime-web of its own where npm found another one beside it.
const nested = join(modules, "@huggingface/transformers/node_modules/onnxruntime-web/dist");
const shared = join(modules, "onnxruntime-web/dist");
const server = await serve({
  folders: {
    model: JSON.parse(readFileSync(requestPath, "utf8")).folder,
    modules,
    runner: here,
    "transformers-wasm": existsSync(nested) ? nested : shared,
  },
  files: { "/": join(here, "page.html"), "/request": requestPath },
});
const answer = `(async () => {
  while (!window.answer) await new Promise((later) => setTimeout(later, 50));
  return await window.answer;
})()`;
let failure = null;
try {
  const page = `${server.origin}/?client=${client}&device=${device}`;
  const said = await visit(chromium, device, page, answer, picture);
  failure = JSON.parse(said).error ?? null;
  if (failure === null) writeFileSync(resultPath, said);
} catch (error) {
  failure = error.message;
}
server.close();
if (failure) console.error(failure);
process.exit(failure ? 1 : 0);
