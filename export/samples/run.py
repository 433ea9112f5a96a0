"""Run the model of this folder with onnxruntime and numpy alone. Takes token ids, or text.

    pip install onnxruntime numpy
    python samples/run.py "15 27 391"                  a prompt's ids; several prompts are a batch
    pip install tokenizers
    python samples/run.py --text "Once upon a time"    the same with text

A causal model goes on with the likeliest tokens. A masked language model prints the likeliest id
of every position, a classifier the names of each prompt's labels. Which file runs, and what kind
of cache it has, stands in config.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FOLDER = Path(__file__).resolve().parents[1]
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Model:
    """A graph and its cache.

    A "growing" cache comes back longer from every call. A "shared" or "static" one is a buffer for
    all tokens that will come; bound as past and as present, it is written in place.
    """

    def __init__(self, folder: Path, precision: str | None, threads: int) -> None:
        config = read(folder / "config.json")
        files = config["gptopt_edge"]["files"]
        if precision is not None and precision not in files:
            sys.exit(f"--precision {precision}: this folder has {', '.join(files)}")
        self.file = files[precision or next(iter(files))]
        self.block_size = config["gptopt"]["block_size"]
        self.ids = config["gptopt"]["tokenizer_size"]  # the head may have more rows than that
        self.labels: list[str] = config["gptopt"].get("labels", [])
        self.several = config["gptopt"].get("multi_label", False)  # labels of one text
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = folder / self.file["file"]
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in self.session.get_inputs()]
        self.past = dict.fromkeys(name for name in names if name.startswith("past_key_values"))
        self.in_place = self.file["cache"] in ("shared", "static")

    def reset(self, rows: int, capacity: int) -> None:
        """An empty cache for so many rows; `capacity` tokens fit where it is written in place."""
        for value in self.session.get_inputs():
            if value.name in self.past:
                shape = (rows, value.shape[1], capacity if self.in_place else 0, value.shape[3])
                empty = np.zeros(shape, TYPES[value.type])
                self.past[value.name] = ort.OrtValue.ortvalue_from_numpy(empty)

    def __call__(self, ids: Any, mask: Any, positions: Any) -> Any:
        """Scores (rows, T, ids) behind ids (rows, T); mask (rows, S) is of all tokens so far.

        Of a classifier: (rows, labels).
        """
        binding = self.session.io_binding()
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        held = {name: np.ascontiguousarray(array, np.int64) for name, array in given.items()}
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        for name, value in self.past.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if self.in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        if not self.in_place:  # else the buffers hold it already
            self.past = dict(zip(self.past, presents, strict=True))
        scores = logits.numpy()
        return scores if self.labels else scores[..., : self.ids]


def pad(prompts: list[list[int]], side: str) -> tuple[Any, Any]:
    """Ids and mask (rows, longest); where the mask is 0 there is padding."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(len(prompt)) if side == "right" else slice(longest - len(prompt), None)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def generate(model: Model, prompts: list[list[int]], tokens: int, end: set[int]) -> Any:
    """The likeliest next tokens of each prompt, up to and with one that ends a text."""
    right = model.file["padding"] == "right"
    if right and model.file["scores"] == "last" and len(set(map(len, prompts))) > 1:
        sys.exit("this file scores the last position only: give prompts of one length")
    ids, mask = pad(prompts, "right" if right else "left")
    rows, longest = ids.shape
    tokens = min(tokens, model.block_size - longest)
    if tokens < 1:
        sys.exit(f"a prompt has {longest} tokens, this model reads up to {model.block_size}")
    model.reset(rows, longest + tokens)
    lengths = mask.sum(1)
    scores = model(ids, mask, np.maximum(mask.cumsum(1) - 1, 0))
    last = np.minimum(lengths if right else longest, scores.shape[1]) - 1
    chosen: list[list[int]] = [[] for _ in prompts]
    scores = scores[np.arange(rows), last]
    for step in range(tokens):
        ids = scores.argmax(1)[:, None]
        for row, id_ in zip(chosen, ids[:, 0].tolist(), strict=True):
            if not (row and row[-1] in end):
                row.append(id_)
        if step == tokens - 1 or all(row[-1] in end for row in chosen):
            break
        if right:  # a row's next token takes the place of its padding
            mask = np.arange(lengths.max() + 1) <= lengths[:, None]
        else:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        scores = model(ids, mask, lengths[:, None])[:, -1]
        lengths = lengths + 1
    return chosen


def whole(model: Model, prompts: list[list[int]]) -> Any:
    """Scores of whole prompts, of a model without a cache."""
    ids, mask = pad(prompts, "right")
    if ids.shape[1] > model.block_size:
        sys.exit(f"a prompt has {ids.shape[1]} tokens, this model reads up to {model.block_size}")
    return model(ids, mask, np.maximum(mask.cumsum(1) - 1, 0))


def likeliest(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest id of every position, of a masked language model."""
    best = whole(model, prompts).argmax(2)
    return [row[: len(prompt)].tolist() for row, prompt in zip(best, prompts, strict=True)]


def labelled(model: Model, prompts: list[list[int]]) -> list[list[str]]:
    """The label of each prompt; of a text that may have several, those likelier than not."""
    scores = whole(model, prompts)
    chosen = scores > 0 if model.several else scores == scores.max(1, keepdims=True)
    return [[model.labels[at] for at in np.flatnonzero(row)] for row in chosen]


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def end_ids(folder: Path) -> set[int]:
    """Ids that end a text."""
    found = read(folder / "generation_config.json").get("eos_token_id", [])
    return set(found if isinstance(found, list) else [found])


def main() -> None:
    """Read the command line, and print a line for each prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="+", help="token ids apart by spaces, or text with --text")
    parser.add_argument("--text", action="store_true", help="prompts are text")
    parser.add_argument("--precision", help="which of the folder's files; none: the first")
    parser.add_argument("--tokens", type=int, default=32, help="how many new tokens")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    given = parser.parse_args()
    tokenizer = None
    if given.text:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            sys.exit("--text needs the package tokenizers: pip install tokenizers")
        if not (FOLDER / "tokenizer.json").is_file():
            sys.exit("this folder has no tokenizer: give token ids, without --text")
        tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in given.prompt]
    else:
        rows = [prompt.split() for prompt in given.prompt]
        if not all(word.isascii() and word.isdecimal() for row in rows for word in row):
            sys.exit("a prompt is not made of token ids: give numbers, or --text and texts")
        prompts = [[int(word) for word in row] for row in rows]
    if given.tokens < 1:
        sys.exit(f"--tokens is {given.tokens}, at least 1 expected")
    if not all(prompts):
        sys.exit("a prompt is empty")
    model = Model(FOLDER, given.precision, given.threads)
    if any(id_ not in range(model.ids) for prompt in prompts for id_ in prompt):
        sys.exit(f"a token id is not among those of this model, 0 to {model.ids - 1}")
    if model.labels:
        sys.stdout.writelines(", ".join(row) + "\n" for row in labelled(model, prompts))
        return
    if model.past:
        rows = generate(model, prompts, given.tokens, end_ids(FOLDER))
    else:
        rows = likeliest(model, prompts)
    for row in rows:
        words = tokenizer.decode(row) if tokenizer else " ".join(map(str, row))
        sys.stdout.write(f"{words}\n")


if __name__ == "__main__":
    main()
