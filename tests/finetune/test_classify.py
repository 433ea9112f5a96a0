"""`gptopt finetune classify`: what is learned, what is refused, and what others make of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gptopt.checkpoint import load_model
from gptopt.errors import UserError
from gptopt.finetune import classify
from gptopt.model import Classifier
from gptopt.scores import probabilities, score_labels

ANIMALS = ("cat", "dog", "cow", "owl", "hen", "fox")
SOUNDS = ("meows", "barks", "moos", "hoots", "clucks", "yelps")

TEXTS = [*(f"what says the {a}?" for a in ANIMALS), *(f"the {a}?" for a in ANIMALS)]


@pytest.fixture
def questions(write):
    """Whether a sentence asks or tells."""
    told = [f"the {a} {s}." for a, s in zip(ANIMALS, SOUNDS, strict=True)]
    rows = [{"text": t, "label": "asks"} for t in TEXTS] + [
        {"text": t, "label": "tells"} for t in [*told, *(f"{t} {t}" for t in told)]
    ]
    return write(*rows)


def refused(options) -> str:
    with pytest.raises(UserError) as caught:
        classify(options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_model_learns_labels(classify_options, questions, tmp_path, pooling):
    result = classify(classify_options(
        questions, steps=0, epochs=12, lr=1e-2, pooling=pooling, val_data=[questions],
        checkpoint_every=0, batch_size=4,
    ))  # fmt: skip
    assert result["labels"] == ["asks", "tells"]
    assert result["val_accuracy"] > 0.95
    assert result["val_f1"] > 0.95
    assert np.trace(result["confusion"]) / np.sum(result["confusion"]) == result["val_accuracy"]
    assert (tmp_path / "run/confusion.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_model(tmp_path / "run")
    assert isinstance(loaded.model, Classifier)
    assert loaded.model.config.labels == ["asks", "tells"]
    assert loaded.model.config.pooling == pooling


def test_several_labels_are_learned_each_by_itself(classify_options, write):
    rows = [
        {"text": f"the {a} {s}.", "label": [k for k, x in (("a", "a" in a), ("o", "o" in a)) if x]}
        for a, s in zip(ANIMALS * 3, SOUNDS * 3, strict=True)
    ]
    data = write(*rows)
    result = classify(classify_options(
        data, multi_label=True, steps=80, lr=2e-2, val_data=[data], checkpoint_every=0,
        batch_size=6, class_weights="balanced",
    ))  # fmt: skip
    assert result["val_accuracy"] > 0.95
    assert result["confusion"] is None
    config = json.loads((Path(result["checkpoint"]) / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


def test_a_masked_model_is_labelled_by_the_mean(classify_options, questions, make_base):
    masked = make_base(causal=False)
    result = classify(classify_options(questions, init_from=masked, steps=1))
    config = load_model(result["checkpoint"]).model.config
    assert (config.pooling, config.causal) == ("mean", False)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_changes_no_score(make_base, pooling, causal):
    from gptopt.config_classifier import ClassifierConfig

    base = load_model(make_base()).model.config
    torch.manual_seed(0)
    shape = base.model_dump() | {"labels": ["a", "b", "c"], "pooling": pooling, "causal": causal}
    model = Classifier(ClassifierConfig(**shape)).double().eval()
    ids = torch.randint(0, 300, (1, 7))
    alone = model(ids).logits
    for left in (0, 3, 4):
        padded = torch.nn.functional.pad(ids, (left, 4 - left), value=9)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 4 - left))
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_head": False,
         "bias": False},
    ],
    ids=["gpt2", "llama"],
)  # fmt: skip
def test_transformers_loads_the_classifier_and_scores_alike(
    classify_options, questions, make_base, shape
):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    base = make_base(**shape)
    result = classify(classify_options(questions, init_from=base, steps=4))
    loaded = load_model(result["checkpoint"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(result["checkpoint"])
    assert theirs.config.id2label == {0: "asks", 1: "tells"}
    rows = [loaded.tokenizer.encode(text) for text in TEXTS[:4]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [loaded.tokenizer.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(
            loaded.model(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5
        )
    # A folder that transformers alone wrote is a classifier too.
    foreign = f"{result['checkpoint']}-theirs"
    theirs.save_pretrained(foreign)
    again = load_model(foreign).model
    assert again.config.labels == ["asks", "tells"]
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected)


def test_a_classifier_learns_on_with_the_same_labels(classify_options, questions, write):
    first = classify(classify_options(questions, "first", steps=2))
    again = classify(classify_options(questions, "again", init_from=first["checkpoint"], steps=2))
    assert again["labels"] == first["labels"]
    other = write({"text": "moo", "label": "moos"}, {"text": "x", "label": "asks"}, name="o.jsonl")
    message = refused(classify_options(other, "other", init_from=first["checkpoint"]))
    assert "line 1: label 'moos' is not one of asks, tells" in message


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"text": "x"}, {}, "line 2: no field 'label' (found: text); choose with --label-field"),
        ({"label": "b"}, {}, "line 2: no field 'text'"),
        ({"text": 3, "label": "b"}, {}, "line 2: field 'text' is int, expected text"),
        ({"text": "x", "label": ""}, {}, "line 2: field 'label': found '', expected a name"),
        ({"text": "x", "label": ["a", "b"]}, {}, "several labels need --multi-label"),
        ({"text": "x", "label": [["a"]]}, {"multi_label": True}, "expected a list of names"),
        ({"text": "x", "label": "c"}, {"labels": ["a", "b"]}, "line 2: label 'c' is not one of"),
        ({"text": "x", "label": "a"}, {}, "every text has the label 'a'"),
        ({"text": "cat " * 50, "label": "b"}, {}, "line 2: 52 tokens, at most 32 fit"),
    ],
)
def test_bad_records_name_their_line(classify_options, write, record, changes, message):
    data = write({"text": "cat", "label": "a"}, record)
    assert message in refused(classify_options(data, **changes))


def test_labels_only_in_the_validation_data_name_their_line(classify_options, write, questions):
    val = write({"text": "x", "label": "asks"}, {"text": "y", "label": "sings"}, name="v.jsonl")
    message = refused(classify_options(questions, val_data=[val]))
    assert "v.jsonl line 2: label 'sings' is not one of asks, tells" in message


def test_rare_labels_count_more_when_balanced(classify_options, write):
    rows = [{"text": "the cat meows.", "label": "a"}] * 9 + [{"text": "what?", "label": "b"}]
    from gptopt.finetune.labelling import Labels

    options = classify_options(write(*rows), class_weights="balanced", val_fraction=0.0)
    objective = Labels(options)
    start = load_model(options.init_from)
    objective.open(Path(), start, resuming=False)
    weights = objective.weights()[0]
    assert weights.tolist() == pytest.approx([10 / 9 / 2, 10 / 2])
    assert (weights * [9, 1]).sum() == pytest.approx(10)


def test_figures_of_labels_are_those_of_their_definitions():
    scores = np.array([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0]])
    targets = np.eye(3)[[0, 1, 0, 0]]
    figures = score_labels(scores, targets, ["a", "b", "c"], multi_label=False)
    assert figures["accuracy"] == 0.75
    assert figures["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    a, b, c = (figures["labels"][name] for name in "abc")
    assert (a["precision"], a["recall"]) == (1.0, pytest.approx(2 / 3))
    assert a["f1"] == pytest.approx(0.8)
    assert (b["precision"], b["recall"], b["count"]) == (0.5, 1.0, 1)
    assert (c["precision"], c["f1"]) == (None, None)
    assert figures["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    chances = probabilities(scores, multi_label=False)
    expected = -np.log(chances[range(4), [0, 1, 0, 0]]).mean()
    assert figures["val_loss"] == pytest.approx(expected)
    several = score_labels(np.array([[3.0, -3]]), np.array([[1, 1]]), ["a", "b"], multi_label=True)
    assert (several["accuracy"], several["confusion"]) == (0.0, None)
    assert several["labels"]["a"]["f1"] == 1.0


def test_resume_is_bit_exact(classify_options, questions, tmp_path, dying_after):
    changes = {"steps": 9, "eval_every": 4, "batch_size": 7, "accumulate": 2, "dropout": 0.1}
    classify(classify_options(questions, "straight", **changes))
    with dying_after(5):
        classify(classify_options(questions, "killed", **changes))
    result = classify(classify_options(questions, "killed", resume=True, **changes))
    assert result["resumed_from"] == 4
    last = [tmp_path / run / "checkpoints/step-000009" for run in ("straight", "killed")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "config.json"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_base):
    """(run folder, its data), of one label and of several."""
    from gptopt.config_finetune import ClassifyOptions

    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for several in (False, True):
        data = folder / f"{several}.jsonl"
        rows = [{"text": t, "label": "asks"} for t in TEXTS]
        rows += [{"text": f"the {a}.", "label": "tells"} for a in ANIMALS]
        if several:
            rows = [{**row, "label": [row["label"], "animal"]} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = folder / f"run-{several}"
        classify(ClassifyOptions(
            inputs=[str(data)], out=str(out), init_from=str(make_base()), steps=30, batch_size=6,
            lr=1e-2, device="cpu", checkpoint_every=0, multi_label=several, json=True,
            pooling="mean" if several else "last",
        ))  # fmt: skip
        made[several] = (out, data)
    return made


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_edge_labels_as_torch_does(trained, tmp_path, several):
    from gptopt.config import EvaluateOptions, GenerateOptions, RunOptions
    from gptopt.config_export import ExportOptions, ValidateOptions
    from gptopt.evaluate import evaluate
    from gptopt.export.verbs import export, validate
    from gptopt.generate import generate
    from gptopt.runtime.verbs import run

    out, data = trained[several]
    edge = str(tmp_path / "edge")
    report = export(
        ExportOptions(
            model=str(out), out=edge, precision="fp32,q8" if several else "fp32", json=True
        )
    )
    assert report["passed"]
    config = json.loads((tmp_path / "edge/config.json").read_text())
    assert config["id2label"] == dict(enumerate_text(["animal", "asks", "tells"][not several :]))
    assert validate(ValidateOptions(folder=edge, model=str(out), json=True))["passed"]
    prompts = ["what says the cat?", "the dog."]
    here = generate(GenerateOptions(model=str(out), prompt=prompts, json=True))["results"]
    there = run(RunOptions(folder=edge, prompt=prompts, json=True))["results"]
    for left, right in zip(here, there, strict=True):
        assert right["labels"] == left["labels"]
        assert right["probabilities"] == pytest.approx(left["probabilities"], abs=1e-5)
    assert here[0]["label"] == (None if several else "asks")
    scores = [
        evaluate(EvaluateOptions(model=m, data=[str(data)], json=True)) for m in (str(out), edge)
    ]
    assert scores[1]["accuracy"] == scores[0]["accuracy"]
    assert scores[1]["val_loss"] == pytest.approx(scores[0]["val_loss"], rel=1e-4)
    with pytest.raises(UserError, match="is a classifier"):
        from gptopt.runtime.edge import EdgeModel

        EdgeModel(edge).new_cache()


def enumerate_text(names):
    return ((str(at), name) for at, name in enumerate(names))


def test_a_classifier_is_no_model_of_tokens(trained, sft_options, replies, tmp_path):
    from gptopt.config import GenerateOptions, SamplingOptions, TrainOptions
    from gptopt.finetune import sft
    from gptopt.generate import generate, generate_tokens
    from gptopt.training import train

    out, _ = trained[False]
    with pytest.raises(UserError, match="classifier, which cannot write a reply"):
        sft(sft_options(replies, init_from=out))
    with pytest.raises(UserError, match="classifier, it cannot continue"):
        generate_tokens(load_model(out).model, [[1]], SamplingOptions())
    with pytest.raises(UserError, match="tokens, the model sees 32"):
        generate(GenerateOptions(model=str(out), prompt=["cat " * 40], json=True))
    text = tmp_path / "t.txt"
    text.write_text("the cat meows. " * 50)
    with pytest.raises(UserError, match="is a classifier, which has no head for tokens"):
        train(TrainOptions(inputs=[str(text)], out=str(tmp_path / "r"), init_from=str(out)))


def test_the_card_has_every_labels_scores(classify_options, write, tmp_path):
    named = ("a|b", "c")
    records = [{"text": f"the {a} is {named[i % 2]}", "label": named[i % 2]} for i, a in
               enumerate(ANIMALS * 3)]  # fmt: skip
    result = classify(classify_options(write(*records), steps=2, val_fraction=0.3))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    for label, each in result["val_scores"].items():
        shown = label.replace("|", "\\|")
        row = " | ".join(f"{each[name]:.4f}" for name in ("precision", "recall", "f1"))
        assert f"| `{shown}` | {row} | {each['count']} |" in card
    assert f"| {result['val_loss']:.4f} | {result['val_accuracy']:.4f} |" in card
