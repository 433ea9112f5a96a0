"""Starting from another model's weights."""

from pathlib import Path

import pytest
import torch

from gptopt.checkpoint import load_model
from gptopt.config import TrainOptions
from gptopt.errors import UserError
from gptopt.training import train


@pytest.fixture
def base(options):
    return train(options("base", steps=4))["checkpoint"]


def from_base(options, base, **changes) -> TrainOptions:
    """Options that name the base and leave the model's shape to it."""
    dumped = options("tuned", init_from=base, **changes).model_dump(by_alias=True)
    return TrainOptions.model_validate({**dumped, "model": changes.get("shape", {})})


def test_init_from_continues_from_the_models_weights_and_shape(options, base):
    result = train(from_base(options, base, steps=1, lr=1e-12, min_lr=0, weight_decay=0))
    start, tuned = load_model(base).model, load_model(result["checkpoint"]).model
    assert tuned.config == start.config
    for left, right in zip(start.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_init_from_may_choose_another_dropout(options, base):
    chosen = from_base(options, base, steps=1)
    chosen = chosen.model_copy(update={"model": TrainOptions(
        inputs=[], out="", model={"dropout": 0.25}).model})  # fmt: skip
    result = train(chosen)
    assert load_model(result["checkpoint"]).model.config.dropout == 0.25


def test_a_run_from_another_model_resumes_like_any_other(options, base, tmp_path):
    straight = from_base(options, base, steps=6)
    expected = train(straight.model_copy(update={"out": str(tmp_path / "straight")}))
    train(from_base(options, base, steps=3))
    result = train(from_base(options, base, steps=6, resume=True))
    assert result["resumed_from"] == 3
    files = [f"{run['checkpoint']}/model.safetensors" for run in (expected, result)]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()


def test_init_from_refuses_a_contradicting_flag(options, base):
    with pytest.raises(UserError, match=r"--model\.n-embd 32: the model .* has 16"):
        train(options("tuned", init_from=base, model={"n_embd": 32}))


def test_init_from_refuses_data_of_another_tokenizer(options, base, corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().replace("cat", "zyx"))
    data = train(options("other", steps=1, inputs=[str(other)]))["out"] + "/data"
    with pytest.raises(UserError, match="tokenizer"):
        train(from_base(options, base, inputs=[data]))
