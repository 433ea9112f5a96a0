// node browser.mjs onnxruntime|transformers CHROMIUM NODE_MODULES REQUEST.json RESULT.json PICTURE.png
// Serves the page and the folder on this machine alone, and asks headless Chromium for the answer.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createReadStream, existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { dirname, extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const [client, chromium, modules, requestPath, resultPath, picturePath] = process.argv.slice(2);
const request = JSON.parse(readFileSync(requestPath, "utf8"));
const here = dirname(fileURLToPath(import.meta.url));
// transformers.js brings an onnxruntime-web of its own where npm found another one beside it.
const nested = join(modules, "@huggingface/transformers/node_modules/onnxruntime-web/dist");
const shared = join(modules, "onnxruntime-web/dist");
const ROOTS = {
  model: request.folder,
  modules,
  runner: here,
  "transformers-wasm": existsSync(nested) ? nested : shared,
};
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript",
  ".json": "application/json", ".wasm": "application/wasm" };

const server = createServer((asked, reply) => {
  const path = decodeURIComponent(new URL(asked.url, "http://localhost").pathname);
  const [, root, ...rest] = path.split("/");
  const file = path === "/" ? join(here, "page.html")
    : path === "/request" ? requestPath
    : normalize(join(ROOTS[root] ?? "/nowhere", ...rest));
  const allowed = path === "/" || path === "/request" || file.startsWith(normalize(ROOTS[root] ?? "") + sep);
  if (!allowed || !existsSync(file) || !statSync(file).isFile()) {
    reply.writeHead(404).end();
    return;
  }
  reply.writeHead(200, {
    "Content-Type": TYPES[extname(file)] ?? "application/octet-stream",
    "Content-Length": statSync(file).size,
    // Without these two a page gets no threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  createReadStream(file).pipe(reply);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const page = `http://127.0.0.1:${server.address().port}/?client=${client}`;

const profile = mkdtempSync(join(tmpdir(), "gptopt-browser-"));
const browser = spawn(chromium, [
  "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--disable-background-networking",
  "--no-first-run", "--disable-dev-shm-usage", "--window-size=1200,800", `--user-data-dir=${profile}`,
  ...(process.getuid?.() === 0 ? ["--no-sandbox"] : []), "about:blank",
], { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
const [toBrowser, fromBrowser] = browser.stdio.slice(3);

const waiting = new Map();
let received = "";
fromBrowser.setEncoding("utf8").on("data", (part) => {
  const messages = (received + part).split("\0");
  received = messages.pop();
  for (const { id, result, error } of messages.map((each) => JSON.parse(each))) {
    const [resolve, reject] = waiting.get(id) ?? [];
    if (error) reject?.(new Error(error.message));
    else resolve?.(result);
  }
});
browser.on("exit", (code) => {
  for (const [, reject] of waiting.values()) reject(new Error(`chromium ended with ${code}`));
});
let asked = 0;
const ask = (method, params = {}, sessionId = undefined) => new Promise((resolve, reject) => {
  asked += 1;
  waiting.set(asked, [resolve, reject]);
  toBrowser.write(`${JSON.stringify({ id: asked, method, params, sessionId })}\0`);
});

let failure = null;
try {
  const { targetId } = await ask("Target.createTarget", { url: page });
  const { sessionId } = await ask("Target.attachToTarget", { targetId, flatten: true });
  const expression = `(async () => {
    while (!window.answer) await new Promise((later) => setTimeout(later, 50));
    return await window.answer;
  })()`;
  let said = null;
  for (let trial = 0; said === null; trial++) {
    try { // while the page loads, what is evaluated in it may be lost with the old one
      const { result } = await ask("Runtime.evaluate",
        { expression, awaitPromise: true, returnByValue: true }, sessionId);
      said = result.value ?? null;
    } catch (error) {
      if (trial === 20) throw error;
      await new Promise((later) => setTimeout(later, 100));
    }
  }
  const { data } = await ask("Page.captureScreenshot", { format: "png" }, sessionId);
  if (picturePath) writeFileSync(picturePath, Buffer.from(data, "base64"));
  const result = JSON.parse(said);
  if (result.error) failure = result.error;
  else writeFileSync(resultPath, said);
  await ask("Browser.close");
} catch (error) {
  failure ??= error.message;
  browser.kill();
}
if (browser.exitCode === null && browser.signalCode === null) await once(browser, "exit");
server.close();
rmSync(profile, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
if (failure) console.error(failure);
process.exit(failure ? 1 : 0);
