"""What users get wrong in data and options: one line, its exit code, and nothing lost."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch

from gptopt import cli
from gptopt.checkpoint import save_model
from gptopt.config import ModelConfig
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and looked at the dog. " * 40
USER, REPLY, SYSTEM = (
    {"role": role, "content": "hi"} for role in ("user", "assistant", "system")
)  # fmt: skip
PAIR = {"prompt": "cat? ", "completion": "meows"}
LABELS = [{"text": "cat", "label": "pet"}, {"text": "fox", "label": "wild"}]
SFT = "finetune sft bad.jsonl --init-from base --out out"
CLASSIFY = "finetune classify bad.jsonl --init-from base --out out"
TRAIN = "train data other --out out --model.n-layer 1 --model.n-head 1 --model.n-embd 8"
LORA = "train data --out out --init-from base --lora.rank 2"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, two data folders and files, that tests copy."""
    root = tmp_path_factory.mktemp("made")
    (root / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train([TEXT], vocab_size=280)
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 320}
    (root / "base").mkdir()
    save_model(root / "base", GPT(ModelConfig(**shape)), tokenizer)
    for name in ("data", "other"):
        given = ["--tokenizer", str(root / "base"), "--json", "--quiet"]
        assert (
            cli.main(["tokenize", str(root / "text.txt"), "--out", str(root / name), *given]) == 0
        )
    table = pyarrow.table({"prompt": ["cat"] * 500, "completion": ["meows"] * 500})
    pyarrow.parquet.write_table(table, root / "cut.parquet")
    whole = (root / "cut.parquet").read_bytes()
    (root / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture
def refused(made, tmp_path, monkeypatch, capsys):
    """refused(command, *records): (exit code, the one line); bad.jsonl holds the records."""
    work = tmp_path / "work"
    shutil.copytree(made, work)
    monkeypatch.chdir(work)

    def run(command, *records, before=lambda: None):
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (work / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
        before()
        given = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        arguments = command.split()
        if arguments[0] != "tokenize":
            arguments += ["--steps", "1", "--quiet"]
            arguments += [] if "--device" in arguments else ["--device", "cpu"]
        code = cli.main(arguments)
        told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(told) == 1, told
        assert all(path.read_bytes() == content for path, content in given.items())
        assert not (work / "out" / "checkpoints").exists()
        return code, told[0]

    return run


@pytest.mark.parametrize(
    ("command", "records", "named"),
    [
        (SFT, [PAIR, {"prompt": "x"}], "bad.jsonl line 2: no field 'completion' (found: prompt)"),
        (SFT, [PAIR, {**PAIR, "prompt": 7}], "bad.jsonl line 2: field 'prompt' is int, expected"),
        (SFT, [PAIR, "{oops"], "bad.jsonl line 2: not JSON"),
        (SFT, [PAIR, {**PAIR, "completion": " "}], "line 2: field 'completion' is empty"),
        (SFT, [{"messages": [REPLY, USER]}], "line 1: field 'messages': message 1: roles out of"),
        (SFT, [{"messages": [USER, USER, REPLY]}], "message 2: roles out of order, 'user' comes"),
        (SFT, [{"messages": [USER, SYSTEM, REPLY]}], "message 2: roles out of order, 'system'"),
        (SFT, [{"messages": [USER]}], "ends with 'user', so there is no reply to learn"),
        (SFT.replace("bad.jsonl", "cut.parquet"), [], "cut.parquet after row 0: not readable as"),
        (CLASSIFY, [*LABELS, {"text": "x"}], "line 3: no field 'label' (found: text); choose with"),
        (CLASSIFY, [*LABELS, {"text": "x", "label": {}}], "line 3: field 'label': found {}"),
        (f"{CLASSIFY} --labels pet --labels wild", [*LABELS, {"text": "x", "label": "rock"}],
         "line 3: label 'rock' is not one of pet, wild"),
        ("tokenize bad.jsonl --out out", [{"text": "x"}, {"txt": "y"}], "line 2: no field 'text'"),
        ("tokenize cut.parquet --out out", [], "cut.parquet after row 0: not readable as parquet"),
        (f"{TRAIN} --mix 0.5,0.6", [], "--mix 0.5,0.6: the weights sum to 1.1, expected 1"),
        (f"{TRAIN} --mix 1", [], "--mix 1: 1 weights for 2 inputs; give each its own"),
        (f"{LORA} --lora.targets conv", [], "--lora.targets conv: the model has no such layer; it"),
        (f"{LORA} --parallel fsdp", [], "--parallel fsdp needs several processes; start them with"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_loses_nothing(refused, command, records, named):
    code, line = refused(command, *records)
    assert code == 2
    assert line.startswith("gptopt: error: ")
    assert named in line


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda whole: whole[:-1], "bytes, dataset.json says"),
        (lambda whole: whole[:-2], "bytes, dataset.json says"),
        (lambda whole: whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]), "its sha256 differs from"),
    ],
)
def test_a_changed_shard_is_a_check_that_failed(refused, tmp_path, content, named):
    shard = tmp_path / "work" / "data" / "train-00000.bin"
    code, line = refused(TRAIN, before=lambda: shard.write_bytes(content(shard.read_bytes())))
    assert code == 1
    assert "data/train-00000.bin: " in line
    assert named in line


def test_more_ranks_than_gpus_is_one_line(refused, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("gptopt.training.distributed._store", lambda launch, timeout: Told())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, line = refused(f"{TRAIN} --device cuda".replace(" other", ""))
    assert code == 2
    assert "torchrun started 2 ranks on this machine, but torch sees 1 CUDA devices" in line


class Told:
    """A store in which nobody else has told the line yet."""

    def add(self, key, amount):
        return amount
