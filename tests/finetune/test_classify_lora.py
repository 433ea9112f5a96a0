"""`gptopt finetune classify --lora.rank`: an adapter and a layer of labels on a base that stays."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptopt.checkpoint import load_model, save_model
from gptopt.errors import UserError
from gptopt.finetune import classify, sft
from gptopt.manifest import read_json, write_json
from gptopt.model import GPT, Classifier

ANIMALS = ("cat", "dog", "cow", "owl", "hen", "fox")
ASKED = [*(f"what says the {a}?" for a in ANIMALS), *(f"the {a}?" for a in ANIMALS)]
TOLD = [*(f"the {a}." for a in ANIMALS), *(f"so says the {a}." for a in ANIMALS)]
LORA = {"rank": 2, "alpha": 8.0, "targets": "attention,ffn"}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_head": False,
         "bias": False}  # fmt: skip


@pytest.fixture
def questions(write):
    """Whether a sentence asks or tells."""
    pairs = [("asks", text) for text in ASKED] + [("tells", text) for text in TOLD]
    records = ({"text": text, "label": label} for label, text in pairs)
    return write(*records, name="questions.jsonl")


@pytest.fixture
def tuned(classify_options, questions):
    """tuned(out, **changes): a run of an adapter that labels."""

    def run(out="run", **changes):
        common = {"lora": LORA, "lr": 2e-2, "batch_size": 6, "val_data": [questions], "steps": 20}
        common |= {"checkpoint_every": 0} | changes
        return classify(classify_options(questions, out, **common))

    return run


@torch.no_grad()
def scores(loaded):
    """(2, L) of two texts, one by one."""
    rows = [torch.tensor([loaded.tokenizer.encode(text)]) for text in ("the cat?", "the dog.")]
    return torch.cat([loaded.model(row).logits for row in rows])


@pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama, untied"])
def test_an_adapter_learns_labels_and_its_base_stays(tuned, make_base, tmp_path, shape):
    base = make_base(**shape)
    before = (base / "model.safetensors").read_bytes()
    result = tuned(init_from=base, steps=60)
    assert result["val_accuracy"] == 1.0
    assert (base / "model.safetensors").read_bytes() == before
    checkpoint = tmp_path / "run/checkpoints/step-000060"
    kept = load_file(checkpoint / "adapter_model.safetensors")
    assert kept["base_model.model.score.weight"].shape == (2, 16)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight", "score.weight")) for name in kept)
    assert read_json(checkpoint / "labels.json") == {
        "labels": ["asks", "tells"], "multi_label": False, "pooling": "last",
    }  # fmt: skip
    loaded = load_model(tmp_path / "run")
    assert isinstance(loaded.model, Classifier)
    # Of the base's own weights none has changed.
    plain = load_model(base).model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        if "lora" not in name and name != "score.weight":
            assert torch.equal(weight, plain[name]), name
    beside = load_model(base, adapter=tmp_path / "run")
    assert torch.equal(scores(beside), scores(loaded))


def test_only_the_adapter_and_the_labels_are_trained(tuned):
    """The optimiser keeps moments of nothing else."""
    result = tuned(steps=2)
    moments = load_file(f"{result['checkpoint']}/optimizer.safetensors")
    names = {name.partition(".")[2] for name in moments}
    assert names
    assert all("_lora." in name or name == "score.weight" for name in names)


def test_merged_it_labels_alike(tuned, questions, tmp_path):
    from gptopt.config import EvaluateOptions
    from gptopt.config_export import ExportOptions, MergeOptions
    from gptopt.evaluate import evaluate
    from gptopt.export.verbs import export
    from gptopt.lora.verb import merge

    tuned(steps=60)
    ways = [str(tmp_path / name) for name in ("run", "merged")]
    merge(MergeOptions(model=ways[0], out=ways[1], json=True))
    alone, merged = (load_model(way) for way in ways)
    torch.testing.assert_close(scores(merged), scores(alone), atol=1e-5, rtol=1e-5)
    assert read_json(tmp_path / "merged/config.json")["id2label"] == {"0": "asks", "1": "tells"}
    told = [evaluate(EvaluateOptions(model=way, data=[questions], json=True)) for way in ways]
    assert told[0]["accuracy"] == told[1]["accuracy"] == 1.0
    with pytest.raises(UserError, match="brings a layer that cannot be switched"):
        export(ExportOptions(
            model=str(alone.folder), adapter=f"one={ways[0]}", out=str(tmp_path / "x"), json=True,
        ))  # fmt: skip


@pytest.mark.slow
def test_exported_it_labels_alike(tuned, tmp_path):
    from gptopt.config import GenerateOptions, RunOptions
    from gptopt.config_export import ExportOptions
    from gptopt.export.verbs import export
    from gptopt.generate import generate
    from gptopt.runtime.verbs import run

    tuned(steps=60)
    model, edge = (str(tmp_path / name) for name in ("run", "edge"))
    assert export(ExportOptions(model=model, out=edge, precision="fp32", json=True))["passed"]
    prompts = ["what says the cat?", "the dog."]
    here = generate(GenerateOptions(model=model, prompt=prompts, json=True))["results"]
    there = run(RunOptions(folder=edge, prompt=prompts, json=True))["results"]
    assert [one["label"] for one in there] == ["asks", "tells"]
    for left, right in zip(here, there, strict=True):
        assert right["probabilities"] == pytest.approx(left["probabilities"], abs=1e-5)


def test_a_resumed_adapter_ends_as_one_that_was_not_interrupted(tuned, tmp_path):
    changes = {"steps": 8, "checkpoint_every": 4, "schedule": "constant", "dropout": 0.1,
               "lora": LORA | {"dropout": 0.1}, "accumulate": 2, "exact": True}  # fmt: skip
    tuned("straight", **changes)
    tuned("broken", **changes | {"steps": 4})
    assert tuned("broken", **changes, resume=True)["resumed_from"] == 4
    ends = [tmp_path / run / "checkpoints/step-000008" for run in ("straight", "broken")]
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name


def test_it_goes_on_from_an_adapter_or_from_what_was_merged(tuned, sft_options, replies, tmp_path):
    first = tuned("first", steps=4)
    again = tuned("again", init_from=tmp_path / "first", steps=0, epochs=1)
    assert again["labels"] == first["labels"]
    # Without --lora.rank all of it is trained on, the adapter merged.
    whole = tuned("whole", init_from=tmp_path / "first", lora={}, steps=2)
    assert load_model(whole["checkpoint"]).model.lora is None
    # An adapter that speaks is merged too, where labels are learned in full; not under another one.
    sft(sft_options(replies, "speaks", steps=2, lora=LORA))
    spoken = tuned("spoken", init_from=tmp_path / "speaks", lora={}, steps=2)
    assert isinstance(load_model(spoken["checkpoint"]).model, Classifier)
    with pytest.raises(UserError, match="has an adapter of its own; merge it first"):
        tuned("more", init_from=tmp_path / "speaks")


def test_an_adapter_on_a_classifier_is_held_to_its_labels(
    tuned, classify_options, questions, tmp_path
):
    classify(classify_options(questions, "plain", steps=4))
    tuned(init_from=tmp_path / "plain")
    folder = load_model(tmp_path / "run").folder
    assert folder.parent.parent == tmp_path / "plain"
    checkpoint = tmp_path / "run/checkpoints/step-000020"
    told = read_json(checkpoint / "labels.json")
    write_json(checkpoint / "labels.json", told | {"labels": ["tells", "asks"]})
    with pytest.raises(UserError, match="labels tells, asks, its base labels asks, tells"):
        load_model(tmp_path / "run")


@pytest.fixture
def folder(tuned, tmp_path):
    """A checkpoint of an adapter that labels, to be damaged."""
    tuned(steps=1)
    return tmp_path / "run/checkpoints/step-000001"


def test_damaged_labels_are_one_clear_line(folder, make_base):
    path, weights = folder / "labels.json", folder / "adapter_model.safetensors"
    told, tensors = read_json(path), load_file(weights)
    score = "base_model.model.score.weight"
    for labels, said in (
        (told | {"labels": ["a", "a"]}, "the label 'a' is there twice"),
        (told | {"labels": [1, 2]}, "labels.0=1"),
        (told | {"pooling": "first"}, "pooling='first'"),
        (told | {"more": 1}, "more=1"),
        (told | {"labels": ["a", "b", "c"]}, "score.weight is .2, 16., .* ask for .3, 16."),
    ):
        path.write_text(json.dumps(labels))
        with pytest.raises(UserError, match=said) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
    write_json(path, told)
    for change, said in (
        ({score: torch.ones(16)}, r"score.weight is \[16\], expected a row for each label"),
        ({score: torch.ones(())}, r"score.weight is \[\], expected a row"),
        ({score: torch.ones(2, 5)}, "do not belong together"),
        ({score: torch.full((2, 16), float("nan"))}, "no finite number"),
    ):
        save_file(tensors | change, weights)
        with pytest.raises(UserError, match=said):
            load_model(make_base(), adapter=folder)
    save_file({name: each for name, each in tensors.items() if name != score}, weights)
    with pytest.raises(UserError, match=r"the layer of the labels, .*, is missing"):
        load_model(make_base(), adapter=folder)


def test_another_base_is_refused(folder, make_base, tmp_path):
    torch.manual_seed(5)
    base = load_model(make_base())
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other", GPT(base.model.config), base.tokenizer)
    with pytest.raises(UserError, match="was trained on another base"):
        load_model(tmp_path / "other", adapter=folder)


def test_labels_of_an_adapter_that_names_none_are_numbered(folder, make_base):
    """As PEFT's are, which keeps no names."""
    (folder / "labels.json").unlink()
    assert load_model(make_base(), adapter=folder).model.config.labels == ["LABEL_0", "LABEL_1"]
