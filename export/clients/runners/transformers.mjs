// Greedy tokens with transformers.js, in Node and in browsers: text or token ids in, ids out.

async function generate(tjs, model, prompts, tokens, padId) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const tensor = (rows) =>
    new tjs.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, longest]);
  const left = (prompt, value) => [...Array(longest - prompt.length).fill(value), ...prompt];
  const inputs = {
    input_ids: tensor(prompts.map((prompt) => left(prompt, padId))),
    attention_mask: tensor(prompts.map((prompt) => left(prompt.map(() => 1), 0))),
  };
  const { logits } = await model(inputs);
  const [rows, width, V] = logits.dims;
  const first = Array.from({ length: rows }, (_, row) =>
    Array.from(logits.data.slice((row * width + width - 1) * V, (row + 1) * width * V)));
  const out = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
  return { tokens: out.tolist().map((row) => row.slice(longest).map(Number)), logits: first };
}

// `name` is the folder's name below env.localModelPath.
export async function answer(tjs, name, request) {
  tjs.env.allowRemoteModels = false;
  tjs.env.allowLocalModels = true;
  const options = { dtype: request.precision, device: request.device };
  const tokenizer = await tjs.AutoTokenizer.from_pretrained(name);
  const kind = request.causal ? tjs.AutoModelForCausalLM : tjs.AutoModelForMaskedLM;
  const model = await kind.from_pretrained(name, options);
  const cases = {};
  for (const each of request.cases) {
    try {
      const prompts = each.prompts ?? [tokenizer.encode(each.text)];
      const done = await generate(tjs, model, prompts, each.tokens, request.pad_id);
      cases[each.name] = { ...done, prompts, text: tokenizer.decode(prompts[0]) };
    } catch (error) {
      cases[each.name] = { error: String(error) };
    }
  }
  return cases;
}
