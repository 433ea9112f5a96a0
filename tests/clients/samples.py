"""The programs in exported folders, run as a person would; part of `make test-clients`.

The Python one is tested by `make test`; the others need what `make clients` installs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptopt.config import SamplingOptions
from gptopt.export.clients.cpp import INCLUDE, build
from gptopt.export.clients.environments import browser, node_modules
from gptopt.export.clients.registry import RUNNERS
from gptopt.export.package import Plan, export_model
from gptopt.export.targets import TARGETS
from gptopt.precisions import find_precisions
from gptopt.runtime import EdgeModel
from gptopt.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from random_models import random_gpt

TESTS = Path(__file__).parents[1]
PICTURES = os.environ.get("GPTOPT_PICTURES")
TEXT, TOKENS = "import the tests", 24
TARGETS_TRIED = ("portable", "ort-cpu", "standard", "legacy", "web")
GREEDY = SamplingOptions(max_new_tokens=TOKENS, temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [path.read_text(encoding="utf-8") for path in sorted(TESTS.glob("*.py"))]
    return Tokenizer.train(texts, vocab_size=1000)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """The folder of a target, or "masked", of a masked language model without a tokenizer."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("exported")
    (root / "node_modules").symlink_to(node_modules())  # where `npm install` above a folder puts it

    def make(name):
        folder = root / name
        if name == "masked" and not folder.exists():
            export_model(random_gpt(vocab_size=1024, block_size=64, causal=False), None, folder)
        elif not folder.exists():
            model = random_gpt(vocab_size=1024, block_size=64, tie_head=True)
            names = "fp32,q4" if "q4" in TARGETS[name].precisions else "fp32"
            plan = Plan(find_precisions(names))
            export_model(model, tokenizer, folder, target=TARGETS[name], plan=plan)
        return folder

    return make


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if INCLUDE not in os.environ:
        pytest.skip(f"{INCLUDE} names no headers of onnxruntime")
    source = tmp_path_factory.mktemp("cpp") / "run.cpp"
    source.write_bytes((RUNNERS.parents[1] / "samples" / "run.cpp").read_bytes())
    return build(source, source.with_suffix(""))


def ids_of(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def expected(folder, ids, precision="auto"):
    edge = EdgeModel(folder, precision=precision)
    if edge.config["causal"]:
        return edge.generate([ids], GREEDY)[0]
    return edge.forward(np.array([ids]))[0][0].argmax(-1).tolist()


@pytest.mark.parametrize("target", [*TARGETS_TRIED, "masked"])
def test_the_one_for_node(target, exported, tokenizer):
    folder, ids = exported(target), tokenizer.encode(TEXT)
    command = ["node", folder / "samples" / "run.mjs", "--tokens", TOKENS]
    assert ids_of(*command, *ids) == expected(folder, ids)
    if target == "portable":
        done = subprocess.run(
            [*map(str, command), "--text", TEXT], capture_output=True, text=True, check=True
        )
        assert done.stdout.rstrip("\n") == tokenizer.decode(expected(folder, ids)).rstrip("\n")


@pytest.mark.parametrize("target", [*TARGETS_TRIED, "masked"])
def test_the_one_in_cpp(target, exported, tokenizer, program):
    folder, ids = exported(target), tokenizer.encode(TEXT)
    assert ids_of(program, folder, "--tokens", TOKENS, *ids) == expected(folder, ids)
    if "q4" in TARGETS.get(target, TARGETS["legacy"]).precisions:
        said = ids_of(program, folder, "--precision", "q4", "--tokens", TOKENS, *ids)
        assert said == expected(folder, ids, "q4")


@pytest.mark.parametrize(
    ("target", "precision", "device"),
    [
        *((target, "fp32", "wasm") for target in (*TARGETS_TRIED, "masked")),
        ("web", "fp32", "webgpu"),
        ("web", "q4", "wasm"),
        ("web", "q4", "webgpu"),
    ],
)
def test_the_page(target, precision, device, exported, tokenizer, tmp_path):
    folder, ids = exported(target), tokenizer.encode(TEXT)
    prompt = " ".join(map(str, ids)) if target == "masked" else TEXT
    ask = {"prompt": prompt, "precision": precision, "device": device, "tokens": str(TOKENS)}
    name = f"sample-{target}-{precision}-{device}.png"
    picture = (tmp_path if PICTURES is None else Path(PICTURES)) / name
    picture.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["node", str(TESTS / "clients" / "page_sample.mjs"), str(RUNNERS), browser(),
         str(node_modules()), str(folder), str(picture), json.dumps(ask)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["wrong"], said["state"]
    found, wanted = [int(id_) for id_ in said["ids"].split()], expected(folder, ids, precision)
    assert len(found) == len(wanted)
    if precision == "fp32":  # in few bits, browsers round the inputs of products another way
        assert found == wanted
    if target == "masked":
        assert said["said"] == " ".join(map(str, wanted))
        assert said["what"] == "Token ids, apart by spaces"
    else:
        assert said["said"] == TEXT + tokenizer.decode(found)
        assert said["what"] == "Text"
    assert said["precisions"][0] == "fp32"
    assert device in said["devices"]


def test_the_page_says_what_is_wrong(exported, tmp_path):
    folder = exported("masked")
    ask = {"prompt": "1 2 5000", "precision": "fp32", "device": "wasm", "tokens": "4"}
    done = subprocess.run(
        ["node", str(TESTS / "clients" / "page_sample.mjs"), str(RUNNERS), browser(),
         str(node_modules()), str(folder), str(tmp_path / "wrong.png"), json.dumps(ask)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["wrong"]
    assert said["state"] == "Error: expected token ids from 0 to 1023"
