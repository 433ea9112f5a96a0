"""Ranks share an evaluation out: the figures are those of one, and each batch is read once."""

import pytest
import torch
from rank import results

from gptopt.config import ModelConfig
from gptopt.data import Masking
from gptopt.evaluate import Share, evaluate_split
from gptopt.evaluate_masked import score_masked, torch_guesser
from gptopt.model import GPT
from gptopt.training import train
from gptopt.training.metrics import read_metrics

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64)


class Text:
    """A split of so many random tokens, which notes where it was read."""

    name = "val"

    def __init__(self, size):
        self.ids = torch.randint(64, (size,)).numpy()
        self.seen = []

    def __len__(self):
        return len(self.ids)

    def read(self, start, end):
        self.seen.append(start)
        return self.ids[start:end]

    def batch(self, offsets, length):
        return torch.stack(
            [torch.from_numpy(self.read(o, o + length + 1)) for o in list(offsets)]
        ).numpy()


def shared(size, score):
    """The results of all ranks, each of which sees the sums over all."""
    sums = []
    for rank in range(size):
        score(Share(rank, size, lambda values: sums.append(values) or [1.0] * len(values)))
    total = [sum(column) for column in zip(*sums, strict=True)]
    return [score(Share(rank, size, lambda values: total)) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("tokens", [58, 65, 17, 4])
def test_the_loss_of_ranks_is_that_of_one(size, tokens):
    model, split = GPT(SHAPE).double(), Text(tokens)

    def score(share):
        return evaluate_split(model, split, block_size=8, batch_size=2, share=share)

    whole = score(Share())
    for loss, count in shared(size, score):
        assert count == whole[1] == tokens - 1
        assert loss == pytest.approx(whole[0], rel=1e-14)


def test_masked_tokens_are_shared_out_alike():
    model = GPT(SHAPE.model_copy(update={"causal": False})).double()
    split = Text(75)

    def score(share):
        return score_masked(
            torch_guesser(model), split, Masking(63, 64, (), 0.3),
            vocab_size=64, block_size=8, batch_size=2, share=share,
        )  # fmt: skip

    whole = score(Share())
    assert whole.tokens > 5
    for each in shared(2, score):
        assert each[1:] == whole[1:]
        assert each.loss == pytest.approx(whole.loss, rel=1e-14)


def test_each_batch_counts_once_and_all_ranks_get_as_many():
    for size in (1, 2, 3, 4):
        parts = [list(Share(rank, size).of(list("abcde"))) for rank in range(size)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(batch for part in parts for batch, counts in part if counts) == list("abcde")
    assert list(Share(1, 2).of([])) == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", ["next", "masked"])
def test_two_ranks_report_what_one_reports(options, tmp_path, ranks, parallel, objective):
    """After one step, on weights that differ in the last bits at most."""
    changes = {"steps": 1, "eval_batches": 0, "objective": objective}
    train(options("one", **changes, batch_size=6))
    results(ranks.train(options("two", **changes, parallel=parallel)))
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two"))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)
    assert two.get("val_accuracy") == one.get("val_accuracy")
