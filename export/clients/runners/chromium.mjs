// A server of files on this machine alone, and one page of it in headless Chromium.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createReadStream, existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { extname, join, normalize, sep } from "node:path";

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript",
  ".json": "application/json", ".wasm": "application/wasm" };
// With webgpu any machine computes as a GPU would, in software.
const GRAPHICS = { wasm: ["--disable-gpu"], webgpu: [
  "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
] };

// Serves folders by the first part of the path, and single files by the whole of it.
export async function serve({ folders, files = {} }) {
  const server = createServer((asked, reply) => {
    const path = decodeURIComponent(new URL(asked.url, "http://localhost").pathname);
    const [, root, ...rest] = path.split("/");
    const folder = normalize(folders[root] ?? "/nowhere");
    const file = files[path] ?? normalize(join(folder, ...rest));
    const allowed = path in files || file.startsWith(folder + sep);
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
  return { origin: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

// What an expression gives in a page, which is waited for; then a picture of the page.
export async function visit(chromium, device, url, expression, picture) {
  const profile = mkdtempSync(join(tmpdir(), "gptopt-browser-"));
  const browser = spawn(chromium, [
    "--headless=new", "--remote-debugging-pipe", "--disable-background-networking", "--no-first-run",
    "--disable-dev-shm-usage", "--window-size=1200,800", `--user-data-dir=${profile}`,
    ...GRAPHICS[device], ...(process.getuid?.() === 0 ? ["--no-sandbox"] : []), "about:blank",
  ], { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
  const ask = connected(browser);
  try {
    return await play(ask, url, expression, picture);
  } finally {
    await closed(browser, ask);
    await removed(profile);
  }
}

// Asked to close, the browser removes what it left outside of its profile.
async function closed(browser, ask) {
  if (browser.exitCode !== null || browser.signalCode !== null) return;
  const ended = once(browser, "exit");
  const patience = setTimeout(() => browser.kill("SIGKILL"), 10_000);
  ask("Browser.close").catch(() => {}); // it may end before it answers
  await ended;
  clearTimeout(patience);
}

// Its helpers may outlive it a little, and write into the profile while it is being removed.
async function removed(folder) {
  for (let trial = 0; ; trial++) {
    try {
      return rmSync(folder, { recursive: true, force: true });
    } catch (error) {
      if (trial === 50) throw error;
      await new Promise((later) => setTimeout(later, 100));
    }
  }
}

async function play(ask, url, expression, picture) {
  const { targetId } = await ask("Target.createTarget", { url });
  const { sessionId } = await ask("Target.attachToTarget", { targetId, flatten: true });
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
  writeFileSync(picture, Buffer.from(data, "base64"));
  return said;
}

// Asks the browser through its debugging pipe: (method, params, session) -> result.
function connected(browser) {
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
  toBrowser.on("error", () => {}); // it ended, which "exit" tells
  let asked = 0;
  return (method, params = {}, sessionId = undefined) => new Promise((resolve, reject) => {
    asked += 1;
    waiting.set(asked, [resolve, reject]);
    toBrowser.write(`${JSON.stringify({ id: asked, method, params, sessionId })}\0`);
  });
}
