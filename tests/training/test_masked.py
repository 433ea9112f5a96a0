"""Masked language models: what is hidden, what is learned, and how they are judged and asked."""

import json
import math

import numpy as np
import pytest

from gptopt.checkpoint import load_model
from gptopt.config import EvaluateOptions, GenerateOptions
from gptopt.data import IGNORED, Masking
from gptopt.errors import UserError
from gptopt.evaluate import evaluate
from gptopt.generate import generate
from gptopt.tokenizer import Tokenizer
from gptopt.training import train

MASKED = {"objective": "masked", "data": {"kind": "word", "vocab_size": 300}}
RULE = Masking(mask_id=99, size=100, control_ids=(98, 99))


def test_of_chosen_tokens_eight_of_ten_are_hidden_and_one_is_replaced():
    ids = np.random.default_rng(0).integers(0, 98, (64, 512))
    inputs, targets = RULE.apply(ids, 7, 1)
    chosen = targets != IGNORED
    count = chosen.sum()
    assert count / ids.size == pytest.approx(0.15, abs=0.01)
    assert (targets[chosen] == ids[chosen]).all()
    assert (inputs[~chosen] == ids[~chosen]).all()
    hidden = inputs[chosen] == 99
    kept = inputs[chosen] == ids[chosen]
    assert hidden.sum() / count == pytest.approx(0.8, abs=0.03)
    assert kept.sum() / count == pytest.approx(0.1, abs=0.03)


def test_masks_are_a_function_of_their_entropy():
    ids = np.random.default_rng(0).integers(0, 98, (4, 64))
    first, again, other = (RULE.apply(ids, 7, epoch) for epoch in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[1], other[1])


def test_control_tokens_are_never_asked_for():
    _, targets = RULE.apply(np.full((32, 64), 98), 1)
    assert (targets == IGNORED).all()


def test_the_mask_takes_the_space_of_the_word_it_stands_for():
    tokenizer = Tokenizer.train(["the cat sat on the mat "] * 3, kind="word", mask_token=True)
    plain = tokenizer.encode("the cat sat on")
    asked = tokenizer.encode_with_control("the cat <mask> on", {tokenizer.mask_id})
    assert asked == [*plain[:2], tokenizer.mask_id, plain[3]]
    letters = Tokenizer.train(["the cat"], kind="char", mask_token=True)
    assert len(letters.encode_with_control("e <mask>")) == 3
    assert "<mask>" in letters.decode([letters.mask_id], skip_special=False)
    assert Tokenizer.train(["a"], kind="char").mask_id is None


def test_a_masked_run_learns_from_both_sides_and_is_asked(options, tmp_path):
    result = train(options(
        steps=300, batch_size=16, lr=1e-2, warmup_steps=20, checkpoint_every=0, eval_batches=0,
        model={"n_embd": 64, "block_size": 16, "position": "rotary"}, **MASKED,
    ))  # fmt: skip
    loaded = load_model(result["best_checkpoint"])
    assert not loaded.model.config.causal
    uniform = math.log(loaded.tokenizer.size)
    assert result["val_loss"] < 0.4 * uniform
    out = tmp_path / "run"
    scored = evaluate(EvaluateOptions(model=str(out), data=[str(out / "data")], json=True))
    assert scored["val_loss"] == pytest.approx(result["best_val_loss"], rel=1e-5)
    assert scored["accuracy"] > 0.4
    assert scored["bits_per_byte"] is None
    answer = generate(GenerateOptions(
        model=str(out), prompt=["the cat <mask> on the mat and looked at the dog."], json=True
    ))  # fmt: skip
    assert answer["text"] == "the cat sat on the mat and looked at the dog."
    assert answer["masks"][0]["guesses"][0]["probability"] > 0.3


def test_resume_repeats_every_mask(options, tmp_path, dying_after):
    changes = {"steps": 7, "eval_every": 4, "batch_size": 30, "accumulate": 2, **MASKED}
    changes["model"] = {"dropout": 0.1}
    train(options("straight", **changes))
    with dying_after(5):
        train(options("killed", **changes))
    assert train(options("killed", resume=True, **changes))["resumed_from"] == 4
    last = [tmp_path / run / "checkpoints/step-000007" for run in ("straight", "killed")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    states = [json.loads((folder / "state.json").read_text())["train"] for folder in last]
    assert states[0]["sampler"] == states[1]["sampler"]
    assert states[0]["sampler"]["epoch"] >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"causal": True}}, "needs a model that sees both sides"),
        ({"objective": "next", "model": {"causal": False}}, "--objective masked"),
    ],
)
def test_the_wrong_attention_is_refused(options, changes, message):
    with pytest.raises(UserError, match=message):
        train(options(**{**MASKED, **changes}))


def test_data_without_a_mask_token_is_refused(options, tmp_path):
    train(options("causal", steps=1))
    with pytest.raises(UserError, match=r"no mask token; tokenise .* --mask-token"):
        train(options(inputs=[str(tmp_path / "causal/data")], objective="masked"))


def test_a_prompt_without_a_mask_is_refused(options, tmp_path):
    train(options(steps=1, **MASKED))
    with pytest.raises(UserError, match="has no <mask>"):
        generate(GenerateOptions(model=str(tmp_path / "run"), prompt=["the cat"], json=True))
    with pytest.raises(UserError, match="tokens, the model sees 8"):
        prompt = "<mask> the cat sat on the mat and looked at the dog"
        generate(GenerateOptions(model=str(tmp_path / "run"), prompt=[prompt], json=True))


def test_the_edge_scores_and_guesses_alike(options, tmp_path):
    pytest.importorskip("onnxruntime")
    from gptopt.config import RunOptions
    from gptopt.config_export import ExportOptions
    from gptopt.export.verbs import export
    from gptopt.runtime.verbs import run

    train(options(steps=20, lr=2e-2, **MASKED))
    out, edge = str(tmp_path / "run"), str(tmp_path / "edge")
    export(ExportOptions(model=out, out=edge, json=True))
    data = [f"{out}/data"]
    scores = [evaluate(EvaluateOptions(model=m, data=data, json=True)) for m in (out, edge)]
    assert scores[1]["val_loss"] == pytest.approx(scores[0]["val_loss"], rel=1e-5)
    assert scores[1]["accuracy"] == scores[0]["accuracy"]
    prompt = ["the <mask> sat on the mat"]
    here = generate(GenerateOptions(model=out, prompt=prompt, json=True))
    there = run(RunOptions(folder=edge, prompt=prompt, json=True))
    assert [g["token"] for g in there["masks"][0]["guesses"]] == [
        g["token"] for g in here["masks"][0]["guesses"]
    ]
