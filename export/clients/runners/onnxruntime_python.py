"""Greedy tokens with onnxruntime and numpy alone: token ids in, token ids out.

python onnxruntime_python.py REQUEST.json RESULT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def pad(prompts: list[list[int]], side: str) -> Any:
    """Ids and mask, (rows, longest)."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def generate(session: Any, prompts: list[list[int]], side: str, tokens: int, cache: str) -> Any:
    """The likeliest next tokens of each prompt, and the scores behind the prompts.

    For no tokens, of a masked language model: the scores of every position of each prompt. A static
    cache is as long from the start as it will be at the end.
    """
    ids, mask = pad(prompts, side)
    rows = np.arange(len(prompts))
    last = ids.shape[1] - 1 - mask[:, ::-1].argmax(1)
    position = (mask.cumsum(1) - 1).clip(0)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    places = ids.shape[1] + tokens if cache == "static" else 0
    past = {
        value.name: np.zeros(
            (len(prompts), value.shape[1], places, value.shape[3]), types[value.type]
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = [value.name for value in session.get_outputs()]
    chosen: list[Any] = []
    first: Any = None
    for _ in range(max(tokens, 1)):
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": position, **past}
        out = dict(zip(names, session.run(names, feed), strict=True))
        if tokens == 0:
            scored = [out["logits"][row, : len(prompt)] for row, prompt in enumerate(prompts)]
            return [[] for _ in prompts], [np.float32(each).ravel().tolist() for each in scored]
        scores = out["logits"][rows, last]
        first = scores if first is None else first
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        ids = scores.argmax(1)[:, None]
        position = mask.sum(1, keepdims=True)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        last = np.zeros_like(rows)
        chosen.append(ids[:, 0])
    return np.stack(chosen, 1).tolist(), first.astype(np.float32).tolist()


def main(request_path: str, result_path: str) -> None:
    """Answer every case of a request."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    path = Path(request["folder"], request["file"])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cases = {}
    for case in request["cases"]:
        try:
            tokens, logits = generate(
                session, case["prompts"], case["padding"], case["tokens"], request["cache"]
            )
            cases[case["name"]] = {"tokens": tokens, "logits": logits}
        except Exception as error:
            cases[case["name"]] = {"error": str(error)}
    answer = {"version": onnxruntime.__version__, "cases": cases}
    Path(result_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
