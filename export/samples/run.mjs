// Run the model of this folder with onnxruntime-node. Takes token ids, or text.
//
//   npm install onnxruntime-node               in this folder's parent, or any folder above it
//   node samples/run.mjs 15 27 391             the ids of a prompt
//   npm install @huggingface/tokenizers
//   node samples/run.mjs --text "Once upon a time"
//
// A causal model goes on with the likeliest tokens. A masked language model prints the likeliest id
// of every position. Which file runs, and what kind of cache it has, stands in config.json.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";

const folder = join(dirname(fileURLToPath(import.meta.url)), "..");
const read = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };

function fail(words) {
  console.error(words);
  process.exit(2);
}

// "growing": each call gives a longer cache. "shared" works so too. "static": a cache is as long as
// it will ever be, from the first call on.
function emptyCache(session, capacity) {
  const past = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!name.startsWith("past_key_values")) continue;
    const dims = [1, shape[1], capacity, shape[3]];
    past[name] = new ort.Tensor(type, new ARRAYS[type](dims.reduce((a, b) => a * b)), dims);
  }
  return past;
}

const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

// Scores of every position as rows of V numbers, and the cache behind the ids.
async function run(session, ids, done, past) {
  const out = await session.run({
    input_ids: row(ids),
    attention_mask: row(Array(done + ids.length).fill(1)),
    position_ids: row(ids.map((_, i) => done + i)),
    ...past,
  });
  const V = out.logits.dims[2];
  const scores = Array.from({ length: out.logits.dims[1] }, (_, at) =>
    out.logits.data.subarray(at * V, (at + 1) * V));
  const present = {};
  for (const name of Object.keys(past)) present[name] = out[name.replace("past_key_values", "present")];
  return { scores, present };
}

// The head may have more rows than there are ids.
function likeliest(scores, count) {
  let best = 0;
  for (let id = 1; id < count; id++) if (scores[id] > scores[best]) best = id;
  return best;
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    text: { type: "boolean", default: false },
    precision: { type: "string" },
    tokens: { type: "string", default: "32" },
  },
});
const config = read("config.json");
const { block_size: longest, tokenizer_size: count } = config.gptopt;
const files = config.gptopt_edge.files;
const precision = values.precision ?? Object.keys(files)[0];
if (!(precision in files)) fail(`--precision ${precision}: this folder has ${Object.keys(files).join(", ")}`);

let tokenizer = null;
let ids = positionals.join(" ").split(/\s+/).filter(Boolean).map(Number);
if (values.text) {
  const { Tokenizer } = await import("@huggingface/tokenizers");
  tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
  ids = tokenizer.encode(positionals.join(" "), { add_special_tokens: false }).ids;
}
if (!(Number.isInteger(Number(values.tokens)) && Number(values.tokens) > 0))
  fail(`--tokens is ${values.tokens}, a number from 1 on expected`);
if (!ids.length) fail("there is no prompt: give token ids, or --text and a text");
if (ids.some((id) => !Number.isInteger(id) || id < 0 || id >= count))
  fail(`a token id is not among those of this model, 0 to ${count - 1}`);

const session = await ort.InferenceSession.create(join(folder, files[precision].file), { logSeverityLevel: 3 });
const causal = session.inputNames.some((name) => name.startsWith("past_key_values"));
const wanted = causal ? Math.min(Number(values.tokens), longest - ids.length) : 0;
if (ids.length > longest || (causal && wanted < 1))
  fail(`the prompt has ${ids.length} tokens, this model reads up to ${longest}`);

const capacity = files[precision].cache === "static" ? ids.length + wanted : 0;
let { scores, present } = await run(session, ids, 0, emptyCache(session, capacity));
let chosen = [];
if (causal) {
  const end = [read("generation_config.json").eos_token_id ?? []].flat();
  for (let done = ids.length; ; done++) {
    chosen.push(likeliest(scores.at(-1), count));
    if (chosen.length === wanted || end.includes(chosen.at(-1))) break;
    ({ scores, present } = await run(session, chosen.slice(-1), done, present));
  }
} else {
  chosen = scores.map((each) => likeliest(each, count));
}
console.log(tokenizer ? tokenizer.decode(chosen, { skip_special_tokens: true }) : chosen.join(" "));
process.exit(0); // the session keeps threads that would keep the process
