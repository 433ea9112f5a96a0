"""Greedy tokens with OpenVINO: token ids in, token ids out.

python openvino_python.py REQUEST.json RESULT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino


def pad(prompts: list[list[int]], side: str) -> Any:
    """Ids and mask, (rows, longest)."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def generate(model: Any, prompts: list[list[int]], side: str, tokens: int) -> Any:
    """The likeliest next tokens of each prompt, and the scores behind the prompts.

    For no tokens, of a masked language model: the scores of every position of each prompt.
    """
    ids, mask = pad(prompts, side)
    rows = np.arange(len(prompts))
    last = ids.shape[1] - 1 - mask[:, ::-1].argmax(1)
    position = (mask.cumsum(1) - 1).clip(0)
    past = {}
    for value in model.inputs:
        if value.any_name.startswith("past_key_values"):
            _, heads, _, size = value.partial_shape
            shape = (len(prompts), heads.get_length(), 0, size.get_length())
            past[value.any_name] = np.zeros(shape, value.element_type.to_dtype())
    request = model.create_infer_request()
    chosen: list[Any] = []
    first: Any = None
    for _ in range(max(tokens, 1)):
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": position, **past}
        out = {value.any_name: array for value, array in request.infer(feed).items()}
        if tokens == 0:
            scored = [out["logits"][row, : len(prompt)] for row, prompt in enumerate(prompts)]
            return [[] for _ in prompts], [np.float32(each).ravel().tolist() for each in scored]
        scores = out["logits"][rows, last]
        first = scores.copy() if first is None else first
        past = {name: out[name.replace("past_key_values", "present")].copy() for name in past}
        ids = scores.argmax(1)[:, None]
        position = mask.sum(1, keepdims=True)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        last = np.zeros_like(rows)
        chosen.append(ids[:, 0])
    return np.stack(chosen, 1).tolist(), first.astype(np.float32).tolist()


def main(request_path: str, result_path: str) -> None:
    """Answer every case of a request."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    # By default products run in bfloat16 where the processor has it. With a single thread an error
    # inside a fused operator goes unseen.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    path = Path(request["folder"], request["file"])
    model = openvino.Core().compile_model(path, "CPU", settings)
    cases = {}
    for case in request["cases"]:
        try:
            tokens, logits = generate(model, case["prompts"], case["padding"], case["tokens"])
            cases[case["name"]] = {"tokens": tokens, "logits": logits}
        except Exception as error:
            cases[case["name"]] = {"error": str(error)}
    answer = {"version": openvino.__version__.split("-")[0], "cases": cases}
    Path(result_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
