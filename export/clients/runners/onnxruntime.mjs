// Greedy tokens with onnxruntime alone, in Node and in browsers: token ids in, token ids out.

const long = (values, dims, ort) =>
  new ort.Tensor("int64", BigInt64Array.from(values.flat(), BigInt), dims);

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };

// Of so many places: a static cache is as long from the start as it will be at the end.
function emptyCache(ort, session, rows, places) {
  const past = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values"))
      past[name] = new ort.Tensor(
        type, new ARRAYS[type](rows * shape[1] * places * shape[3]), [rows, shape[1], places, shape[3]]);
  }
  return past;
}

function likeliest(scores) {
  let best = 0;
  for (let id = 1; id < scores.length; id++) if (scores[id] > scores[best]) best = id;
  return best;
}

// For no tokens, of a masked language model: the scores of every position of each prompt.
async function generate(ort, session, prompts, side, tokens, cache) {
  const rows = prompts.length;
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const filled = (prompt, value) => {
    const padding = Array(longest - prompt.length).fill(0);
    const real = prompt.map((id) => value ?? id);
    return side === "left" ? [...padding, ...real] : [...real, ...padding];
  };
  let ids = prompts.map((prompt) => filled(prompt));
  const mask = prompts.map((prompt) => filled(prompt, 1));
  let positions = mask.map((row) => row.map((_, i) => {
    const real = row.slice(0, i + 1).reduce((sum, each) => sum + each);
    return Math.max(real - 1, 0);
  }));
  let last = mask.map((row) => row.lastIndexOf(1));
  let past = emptyCache(ort, session, rows, cache === "static" ? longest + tokens : 0);
  const chosen = prompts.map(() => []);
  let first = null;
  for (let step = 0; step < Math.max(tokens, 1); step++) {
    const width = ids[0].length;
    const out = await session.run({
      input_ids: long(ids, [rows, width], ort),
      attention_mask: long(mask, [rows, mask[0].length], ort),
      position_ids: long(positions, [rows, width], ort),
      ...past,
    });
    const V = out.logits.dims[2];
    if (tokens === 0) {
      const every = prompts.map(({ length }, row) =>
        Array.from(out.logits.data.subarray(row * width * V, (row * width + length) * V)));
      return { tokens: chosen, logits: every };
    }
    const scores = last.map((at, row) => {
      const begin = (row * width + at) * V;
      return out.logits.data.subarray(begin, begin + V);
    });
    first ??= scores.map((row) => Array.from(row));
    for (const name of Object.keys(past)) past[name] = out[name.replace("past_key_values", "present")];
    ids = scores.map((row) => [likeliest(row)]);
    ids.forEach(([id], row) => chosen[row].push(id));
    positions = mask.map((row) => [row.reduce((sum, each) => sum + each)]);
    mask.forEach((row) => row.push(1));
    last = last.map(() => 0);
  }
  return { tokens: chosen, logits: first };
}

export async function answer(ort, session, request) {
  const cases = {};
  for (const { name, prompts, padding, tokens } of request.cases) {
    try {
      cases[name] = await generate(ort, session, prompts, padding, tokens, request.cache);
    } catch (error) {
      cases[name] = { error: String(error) };
    }
  }
  return cases;
}
