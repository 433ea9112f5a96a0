"""Folders of models, adapters, data and checkpoints, changed at random: used, or one line of ours.

Each change is signed anew where a manifest would tell it, as a stranger's folder would be.
"""

import copy
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gptopt.checkpoint import load_model
from gptopt.config import DataOptions, TokenizeOptions, TrainOptions
from gptopt.config_finetune import ClassifyOptions
from gptopt.data import open_dataset, tokenize
from gptopt.errors import UserError
from gptopt.finetune import classify
from gptopt.manifest import verify_manifest, write_manifest
from gptopt.training import train

TEXT = "the cat sat on the mat and looked at the dog. " * 12
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
COMMON = {
    "steps": 2, "batch_size": 2, "warmup_steps": 1, "eval_every": 0, "eval_batches": 1,
    "checkpoint_every": 2, "log_every": 1, "device": "cpu", "json": True, "schedule": "constant",
}  # fmt: skip
DEEP = "nested very deep"  # stands for brackets that json.dumps cannot write
JUNK = [
    None, True, False, 0, -1, 1, 3, 2**24 + 1, 2**31, 2**63, -(2**63), 2**70, 0.5, 1e308, -0.0,
    float("nan"), float("inf"), "", "x", "../x", "/dev/zero", "\x00", "\ud800", "a\nb", "9" * 5000,
    [], [1], ["a", "b"], [[]], {}, {"a": 1}, {"type": "BPE"}, DEEP,
]  # fmt: skip


# --- changes --------------------------------------------------------------------------------------


def places(node):
    """Every (container, key) of some JSON."""
    found = []
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


@st.composite
def changed_json(draw, content):
    """JSON of another structure or other values."""
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        found = places(value)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "move"])):
            case "replace":
                container[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(["x", "", "auto_map", "labels", "\n"]))] = 1
            case _:  # what is at one place, at another
                other, place = draw(st.sampled_from(found))
                container[key] = copy.deepcopy(other[place]) if place in keys(other) else 0
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


def keys(container):
    return container if isinstance(container, dict) else range(len(container))


@st.composite
def changed_bytes(draw, content):
    """Bytes cut, changed, or put in between."""
    place = draw(st.integers(0, max(0, len(content) - 1)))
    some = draw(st.sampled_from([b"\x00", b"\xff", b"{", b'"', b"\x80\xfe", b"9" * 40]))
    match draw(st.sampled_from(["cut", "over", "between"])):
        case "cut":
            return content[:place]
        case "over":
            return content[:place] + some + content[place + len(some) :]
    return content[:place] + some + content[place:]


@st.composite
def changed_tensors(draw, content):
    """A safetensors file whose header says something else."""
    (length,) = struct.unpack("<Q", content[:8])
    header = draw(changed_json(content[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def changed(path):
    """Changes of a file, most of them where its parser has come far already."""
    content, kinds = path.read_bytes(), [changed_bytes]
    if path.suffix == ".json":
        kinds = [changed_json, changed_json, changed_json, changed_bytes]
    elif path.suffix == ".safetensors":
        kinds = [changed_tensors, changed_tensors, changed_bytes]
    return st.sampled_from(kinds).flatmap(lambda kind: kind(content))


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Good folders of every kind, side by side."""
    root = tmp_path_factory.mktemp("made")
    (root / "text.txt").write_text(TEXT)
    data, model = {"kind": "char"}, {"model": SHAPE, "inputs": [str(root / "text.txt")]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptopt.training.run.matmul_peak", lambda device, dtype: None)
        patch.setattr("gptopt.training.run.draw_loss", lambda *given: False)

        def run(name, **changes):
            values = COMMON | model | {"data": data, "out": str(root / name)} | changes
            train(TrainOptions.model_validate(values))

        run("run")
        from_run = {"init_from": str(root / "run")}
        lora = from_run | {"lora": {"rank": 2}}
        run("tuned", **lora, model={})
        records = [{"text": t, "label": t[0]} for t in ("the cat", "cat sat", "a mat", "the dog")]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (root / "labels.jsonl").write_text(lines)
        for name, start in (("labels", from_run), ("tuned-labels", lora)):
            values = COMMON | start | {"inputs": [str(root / "labels.jsonl")], "out": name}
            classify(ClassifyOptions.model_validate(values | {"out": str(root / name)}))
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # fmt: skip
        for name, value in names.items():
            patch.setenv(name, str(value))
        run("sharded", parallel="fsdp")
    tokenize(TokenizeOptions(inputs=[str(root / "text.txt")], out=str(root / "data"), kind="char",
                             json=True))  # fmt: skip
    for name in ("run", "tuned", "labels", "tuned-labels"):
        shutil.copytree(root / name / "checkpoints/step-000002", root / f"{name}-model")
    split_weights(root / "run-model", root / "shards-model")
    return root


def split_weights(folder, out):
    """The same model in two files and their index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    table = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, out / file)
        table |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def read_model(folder):
    loaded = load_model(folder)
    loaded.model(torch.arange(4)[None] % loaded.model.config.vocab_size)
    if loaded.tokenizer is not None:
        loaded.tokenizer.decode(loaded.tokenizer.encode("the cat"))


def put_on(folder):
    read_model(folder)  # by the name of its base


def read_data(folder):
    dataset = open_dataset([str(folder)], DataOptions())
    split = dataset.train
    sampler = dataset.sampler(8, 2, 0, 0, 1)
    split.batch(sampler.next(), 8)


def resume(run):
    values = COMMON | {"inputs": [str(run.parent / "made/text.txt")], "resume": True, "steps": 3}
    values |= {"model": SHAPE, "data": {"kind": "char"}, "out": str(run)}
    train(TrainOptions.model_validate(values))


def check(folder):
    verify_manifest(folder, "checkpoint")


STEP = "checkpoints/step-000002"
WEIGHTS = ["adapter_config.json", "adapter_model.safetensors"]
# What is copied, what is changed in it, where the manifest stands that is then signed anew, use.
TARGETS = {
    "model": ("run-model", ["config.json", "tokenizer.json", "tokenizer_config.json",
                            "model.safetensors"], None, read_model),
    "model in shards": ("shards-model", ["model.safetensors.index.json",
                                         "model-00001-of-00002.safetensors"], None, read_model),
    "classifier": ("labels-model", ["config.json", "model.safetensors"], None, read_model),
    "adapter": ("tuned-model", WEIGHTS, None, put_on),
    "adapter of labels": ("tuned-labels-model", [*WEIGHTS, "labels.json"], None, put_on),
    "data": ("data", ["dataset.json", "tokenizer.json"], None, read_data),
    "manifest": (f"run/{STEP}", ["manifest.json"], None, check),
    "run": ("run", [f"{STEP}/state.json", f"{STEP}/optimizer.safetensors",
                    f"{STEP}/rng.safetensors", f"{STEP}/config.json"], STEP, resume),
    "run in shards": ("sharded", [
        f"{STEP}/optimizer.safetensors.index.json", f"{STEP}/state.json",
        f"{STEP}/optimizer-00001-of-00001.safetensors"], STEP, resume),
    "files of a run": ("run", ["env.json", "metrics.jsonl", "result.json", "latest", "best",
                               "data/dataset.json", f"{STEP}/manifest.json"], None, resume),
}  # fmt: skip


@pytest.fixture
def bounded(monkeypatch):
    """No more memory than some: who believes a size that lies is refused it."""
    monkeypatch.setattr("gptopt.training.run.matmul_peak", lambda device, dtype: None)
    monkeypatch.setattr("gptopt.training.run.draw_loss", lambda *given: False)
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    now = pages * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", TARGETS)
def test_what_was_changed_is_used_or_refused_in_one_line(made, tmp_path, bounded, target):
    source, files, signed, use = TARGETS[target]
    (tmp_path / "made").symlink_to(made)
    folder, refused = tmp_path / "folder", []

    @settings(
        max_examples=25 if use is resume else 100, phases=[Phase.generate], database=None,
        derandomize=True, deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def try_one(data):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made / source, folder)
        path = folder / data.draw(st.sampled_from(files))
        path.write_bytes(data.draw(changed(path)))
        if signed:
            write_manifest(folder / signed, "checkpoint")
        try:
            use(folder)
        except UserError:
            refused.append(1)

    try_one()
    assert len(refused) >= 4
