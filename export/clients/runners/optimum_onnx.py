"""Greedy tokens with optimum-onnx and transformers' generate(): text or token ids in, ids out.

python optimum_onnx.py REQUEST.json RESULT.json
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForMaskedLM
from transformers import AutoTokenizer


def generate(model: Any, prompts: list[list[int]], tokens: int, pad_id: int) -> Any:
    """Rows are padded on the left, as generate() expects them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
        pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, longest:].tolist(), out.logits[0].float().tolist()


def every_position(model: Any, prompts: list[list[int]]) -> Any:
    """Scores of every position, of a masked language model."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    logits = model(input_ids=ids, attention_mask=mask).logits
    every = [logits[row, : len(prompt)].flatten().tolist() for row, prompt in enumerate(prompts)]
    return [[] for _ in prompts], every


def main(request_path: str, result_path: str) -> None:
    """Answer every case of a request."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    folder, name = request["folder"], Path(request["file"]).name
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    kind = ORTModelForCausalLM if request["causal"] else ORTModelForMaskedLM
    model = kind.from_pretrained(folder, file_name=name, session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = {}
    for case in request["cases"]:
        try:
            prompts = case.get("prompts") or [tokenizer(case["text"])["input_ids"]]
            if request["causal"]:
                tokens, logits = generate(model, prompts, case["tokens"], request["pad_id"])
            else:
                tokens, logits = every_position(model, prompts)
            cases[case["name"]] = {
                "prompts": prompts, "tokens": tokens, "logits": logits,
                "text": tokenizer.decode(prompts[0]),
            }  # fmt: skip
        except Exception as error:
            cases[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
    answer = {"version": importlib.metadata.version("optimum-onnx"), "cases": cases}
    Path(result_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
