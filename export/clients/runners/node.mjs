// node node.mjs onnxruntime|transformers NODE_MODULES REQUEST.json RESULT.json
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";

const [client, modules, requestPath, resultPath] = process.argv.slice(2);
const request = JSON.parse(readFileSync(requestPath, "utf8"));
const installed = createRequire(join(resolve(modules), "from-here.js"));
const versionOf = (name) =>
  JSON.parse(readFileSync(join(modules, name, "package.json"), "utf8")).version;

async function onnxruntime() {
  const ort = installed("onnxruntime-node");
  const session = await ort.InferenceSession.create(join(request.folder, request.file), {
    intraOpNumThreads: request.threads,
  });
  const { answer } = await import("./onnxruntime.mjs");
  return { version: versionOf("onnxruntime-node"), cases: await answer(ort, session, request) };
}

async function transformers() {
  const tjs = installed("@huggingface/transformers");
  tjs.env.localModelPath = dirname(resolve(request.folder));
  const { answer } = await import("./transformers.mjs");
  const cases = await answer(tjs, basename(request.folder), { ...request, device: "cpu" });
  return { version: tjs.env.version, cases };
}

const result = await { onnxruntime, transformers }[client]();
writeFileSync(resultPath, JSON.stringify(result));
process.exit(0); // sessions keep threads that would keep the process
