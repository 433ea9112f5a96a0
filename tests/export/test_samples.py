"""The programs in an exported folder: they say what our runtime says, from config.json alone."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_models import random_gpt, spread

from gptopt.config import ModelConfig, SamplingOptions
from gptopt.config_classifier import Labelling
from gptopt.errors import CheckFailed
from gptopt.export.package import Plan, export_model
from gptopt.export.samples import SAMPLES
from gptopt.export.targets import TARGETS
from gptopt.model.classifier import Classifier
from gptopt.precisions import find_precisions
from gptopt.runtime import EdgeModel
from gptopt.runtime.folder import verify_folder
from gptopt.runtime.label import label_texts
from gptopt.tokenizer import Tokenizer

PROMPTS = [[15, 27, 91, 8, 33], [7, 9], [100, 3, 3, 41]]
# A buffer that the file may share and padding anywhere; padding on the right; a buffer that it must
# share; a cache that grows.
TARGETS_TRIED = {"portable": "q4,fp16", "ort-cpu": "fp32", "standard": "fp32", "legacy": "fp32"}


@pytest.fixture(scope="module")
def tokenizer():
    words = "a small text of quite a few words, and of numbers such as 12 or 345; " * 20
    return Tokenizer.train([words], kind="bpe", vocab_size=300)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """The folder of a target, made when it is first asked for."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = random_gpt(n_layer=1, vocab_size=320, block_size=32)
    root = tmp_path_factory.mktemp("exported")

    def make(target):
        if not (root / target).exists():
            plan = Plan(find_precisions(TARGETS_TRIED[target]))
            export_model(model, tokenizer, root / target, target=TARGETS[target], plan=plan)
        return root / target

    return make


@pytest.fixture
def folder(exported):
    return exported("portable")


def python(folder, *words):
    command = [sys.executable, "-P", str(folder / "samples" / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)


def ids_of(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def spelt(prompts):
    return [" ".join(map(str, prompt)) for prompt in prompts]


@pytest.mark.parametrize("target", TARGETS_TRIED)
def test_the_python_one_says_what_our_runtime_says(target, exported):
    folder = exported(target)
    greedy = SamplingOptions(max_new_tokens=16, temperature=0)
    for precision in json.loads((folder / "config.json").read_text())["gptopt_edge"]["files"]:
        edge = EdgeModel(folder, precision=precision)
        given = ("--tokens", "16", "--precision", precision, "--threads", "1")
        said = ids_of(python(folder, *given, *spelt(PROMPTS)))
        assert said == edge.generate(PROMPTS, greedy)
        assert len({token for row in said for token in row}) > 8


def test_it_reads_and_writes_text(folder, tokenizer):
    edge = EdgeModel(folder)
    ids = edge.generate(
        [tokenizer.encode("a small text")], SamplingOptions(max_new_tokens=6, temperature=0)
    )
    done = python(folder, "--text", "--tokens", "6", "a small text")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == tokenizer.decode(ids[0]).rstrip("\n")


def test_it_stops_where_the_text_ends(folder, tmp_path):
    """The end is read from the folder: name another one, and it stops there."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    (row,) = ids_of(python(copied, "--tokens", "12", *spelt(PROMPTS[:1])))
    end = row[3]
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    (stopped,) = ids_of(python(copied, "--tokens", "12", *spelt(PROMPTS[:1])))
    assert stopped == row[: row.index(end) + 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "q2", "1 2"], "--precision q2: this folder has "),
        (["1 2 300"], "a token id is not among those of this model, 0 to 299"),
        ([" ".join(["1"] * 32)], "a prompt has 32 tokens, this model reads up to 32"),
        ([""], "a prompt is empty"),
        (["Once upon a time"], "a prompt is not made of token ids: give numbers, or --text"),
        (["--text", "a word"], "this folder has no tokenizer: give token ids"),
        (["--tokens", "0", "1 2"], "--tokens is 0, at least 1 expected"),
    ],
)
def test_what_is_wrong_is_one_line(folder, words, message, tmp_path):
    if "no tokenizer" in message:
        folder = shutil.copytree(folder, tmp_path / "bare")
        (folder / "tokenizer.json").unlink()
    done = python(folder, *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_masked_language_model_tells_the_likeliest_of_every_position(tmp_path):
    model = random_gpt(n_layer=1, vocab_size=320, block_size=32, causal=False)
    export_model(model, None, tmp_path / "masked")
    said = ids_of(python(tmp_path / "masked", *spelt(PROMPTS)))
    edge = EdgeModel(tmp_path / "masked")
    for prompt, row in zip(PROMPTS, said, strict=True):
        logits, _ = edge.forward(np.array([prompt]))
        assert row == logits[0].argmax(-1).tolist()


def test_they_are_part_of_the_folder_and_nothing_else_is(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    verify_folder(copied)
    assert sorted(path.name for path in (copied / "samples").iterdir()) == sorted(SAMPLES)
    source = copied / "samples" / "run.py"
    source.write_text(source.read_text() + "print('something else')\n")
    with pytest.raises(CheckFailed, match=r"run\.py: has \d+ bytes, manifest.json says"):
        EdgeModel(copied)
    shutil.copy(folder / "samples" / "run.py", source)
    shutil.copy(source, copied / "samples" / "numpy.py")
    with pytest.raises(CheckFailed, match=r"'samples/numpy.py' has no place in an exported folder"):
        EdgeModel(copied)


def test_each_says_at_its_top_what_it_takes(folder):
    for name in SAMPLES:
        head = (folder / "samples" / name).read_text(encoding="utf-8")[:900]
        assert "Takes token ids" in head or "Takes text" in head
        assert "config.json" in (folder / "samples" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_python_one_names_the_labels_of_a_text(multi_label, tokenizer, tmp_path):
    shape = ModelConfig(n_layer=1, n_head=4, n_embd=32, block_size=32, vocab_size=320)
    labelling = Labelling(labels=["one", "two", "three"], multi_label=multi_label)
    model = spread(Classifier(labelling.of(shape), kernels="reference"))
    folder = tmp_path / "edge"
    export_model(model, tokenizer, folder)
    assert {path.name for path in (folder / "samples").iterdir()} == {"run.py"}
    texts = ["a small text", "numbers", "12 or 345", "words and words", "few of quite a few", "or"]
    edge = EdgeModel(folder)
    wanted = label_texts(
        lambda ids, mask: edge.forward(ids, mask)[0], tokenizer, texts,
        labels=edge.config["labels"], multi_label=multi_label, block_size=edge.block_size,
    )  # fmt: skip
    done = python(folder, "--text", *texts)
    assert done.stderr == ""
    said = done.stdout.splitlines()
    assert said == [", ".join(each["labels"]) for each in wanted]
    assert len(set(said)) > 1
