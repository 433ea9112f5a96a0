"""Greedy tokens with onnxruntime-genai: text or token ids in, token ids out.

python genai.py REQUEST.json RESULT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def generate(model: Any, prompts: list[list[int]], tokens: int, pad_id: int) -> Any:
    """Rows are padded on the right: genai finds the padding by its id."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + tokens, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    first = np.asarray(generator.get_logits(), np.float32)[:, -1]
    chosen: list[Any] = []
    while len(chosen) < tokens and not generator.is_done():
        generator.generate_next_token()
        chosen.append(np.array(generator.get_next_tokens()))
    return np.stack(chosen, 1).tolist(), first.tolist()


def main(request_path: str, result_path: str) -> None:
    """Answer every case of a request."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    config = og.Config(request["folder"])
    session = {"intra_op_num_threads": request["threads"]}
    decoder = {"filename": request["file"], "session_options": session}
    config.overlay(json.dumps({"model": {"decoder": decoder}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    cases = {}
    for case in request["cases"]:
        try:
            prompts = case.get("prompts") or [tokenizer.encode(case["text"]).tolist()]
            tokens, logits = generate(model, prompts, case["tokens"], request["pad_id"])
            text = tokenizer.decode(np.array(prompts[0], np.int32))
            cases[case["name"]] = {
                "prompts": prompts, "tokens": tokens, "logits": logits, "text": text
            }  # fmt: skip
        except Exception as error:
            cases[case["name"]] = {"error": str(error)}
    answer = {"version": og.__version__, "cases": cases}
    Path(result_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
