"""The proof's own judgement, on claims made by hand, and the plays that make claims."""

import numpy as np
import pytest
import torch
from random_models import random_gpt

from gptopt.export.cases import Stage, context_edge
from gptopt.export.reference import Expected, Reference
from gptopt.export.stream import Claim, Stream, as_ids
from gptopt.export.validate import Proof, judge, judge_greedy

V = 5


def claim(logits, tokens=(1, 2, 3), first=0, row=0):
    return Claim(tokens, first, np.asarray(logits, np.float32), row, 0)


def expected(double, error=0.0):
    double = np.asarray(double, np.float64)
    return Expected(double, (double + error).astype(np.float32))


LOGITS = np.linspace(-5, 5, 3 * V).reshape(3, V)


def test_the_budget_is_a_part_of_the_range_where_pytorch_is_more_exact():
    outcome = judge("case", [claim(LOGITS + 1.5e-4)], [expected(LOGITS)])
    assert outcome.logit_range == 10
    assert outcome.budget == pytest.approx(2e-4)
    assert outcome.passed
    assert outcome.positions == 3


def test_the_budget_is_twice_pytorchs_error_where_that_is_more():
    outcome = judge("case", [claim(LOGITS + 9e-3)], [expected(LOGITS, error=5e-3)])
    assert outcome.budget == pytest.approx(1e-2, rel=1e-3)
    assert outcome.passed


def test_the_first_position_beyond_the_budget_is_named():
    logits = LOGITS.copy()
    logits[2, 3] += 1e-3
    outcomes = judge(
        "case",
        [claim(LOGITS), claim(logits, tokens=(7, 8, 9, 4), first=1, row=2)],
        [expected(LOGITS)] * 2,
    )
    assert not outcomes.passed
    assert outcomes.first_bad == "token 3 of row 2"
    assert outcomes.max_abs_error == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(bad):
    logits = LOGITS.copy()
    logits[1, 0] = bad
    outcome = judge("case", [claim(logits)], [expected(LOGITS)])
    assert not outcome.passed
    assert outcome.first_bad == "token 1 of row 0"


def test_greedy_tokens_agree_or_are_near_ties_or_are_wrong():
    clear = [0.0, 9.0, 0.0, 0.0, 0.0]
    tie = [0.0, 9.0, 8.9999, 0.0, 0.0]
    other = [0.0, 0.0, 9.0, 0.0, 0.0]
    judged = judge_greedy(
        [claim([clear]), claim([other]), claim([other], tokens=(1, 2, 3, 4))],
        [expected([clear]), expected([tie]), expected([clear])],
        budget=1e-3,
        vocab_size=V,
    )
    assert (judged.tokens, judged.agreeing, judged.near_ties, judged.distinct) == (3, 1, 1, 2)
    assert judged.first_bad == "token 4"


def test_padding_of_the_vocabulary_is_never_chosen():
    padded = [0.0, 1.0, 2.0, 0.0, 9.0]
    judged = judge_greedy([claim([padded])], [expected([padded])], budget=0.0, vocab_size=3)
    assert judged.agreeing == 1
    assert judged.distinct == 1


def test_a_proof_fails_where_one_case_or_one_token_fails():
    good = judge("good", [claim(LOGITS)], [expected(LOGITS)])
    bad = judge("bad", [claim(LOGITS + 1)], [expected(LOGITS)])
    assert Proof(outcomes=[good]).passed
    proof = Proof(outcomes=[good, bad])
    assert not proof.passed
    assert proof.worst is bad
    assert proof.failure.startswith("bad: logit error 1.00e+00, budget 2.00e-04")
    greedy = judge_greedy([claim([[0, 1]])], [expected([[1, 0]])], budget=0.1, vocab_size=2)
    assert Proof(outcomes=[good], greedy=greedy).failure == "greedy: another token at token 3"


def test_the_reference_is_the_plain_model_on_each_text():
    model = random_gpt(vocab_size=64, block_size=16)
    claims = [
        claim(np.zeros((1, 64)), tokens=(5,), first=0),
        claim(np.zeros((2, 64)), tokens=(5, 6, 7), first=1),
        claim(np.zeros((1, 64)), tokens=(9, 8), first=1),
    ]
    found = Reference(model, causal=True).expect(claims)
    for each, wanted in zip(claims, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([each.tokens])).logits[0, each.first :].numpy()
        np.testing.assert_allclose(wanted.single, logits, atol=1e-5)
        np.testing.assert_allclose(wanted.double, logits, atol=1e-4)
        assert wanted.double.dtype == np.float64
    assert next(model.parameters()).dtype == torch.float32


class Recorder:
    """Stands for a graph: notes what it is fed, and says back each token's position."""

    shared = False

    def __init__(self):
        self.fed = []

    def run(self, ids, mask, positions, past, keep=0):
        cache = ids[:, None, :, None] + np.zeros((1, 1, 1, 1))
        past = [np.concatenate((part, cache), axis=2) for part in past] if past else [cache] * 2
        self.fed.append((ids, mask.astype(int), positions, past[0].shape))
        return positions[..., None].astype(np.float32), past


def test_a_stream_counts_real_tokens_and_grows_its_mask():
    graph = Recorder()
    stream = Stream(graph, 2)
    stream.feed(as_ids([[1, 2, 3], [4, 5, 6]]), as_ids([[1, 1, 1], [0, 0, 1]]))
    stream.feed(as_ids([[7], [8]]))
    assert graph.fed[0][2].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert graph.fed[1][2].tolist() == [[3], [1]]
    assert graph.fed[1][1].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert graph.fed[1][3] == (2, 1, 4, 1)
    assert [(c.tokens, c.first, c.row) for c in stream.claims] == [
        ((1, 2, 3), 0, 0), ((6,), 0, 1), ((1, 2, 3, 7), 3, 0), ((6, 8), 1, 1),
    ]  # fmt: skip


def test_a_stream_follows_beams_and_rewinds():
    graph = Recorder()
    stream = Stream(graph, 2)
    stream.feed(as_ids([[1, 2], [3, 4]]))
    stream.reorder([1, 1])
    stream.feed(as_ids([[5], [6]]))
    stream.rewind(1)
    stream.feed(as_ids([[7], [8]]))
    assert [c.tokens for c in stream.claims[2:4]] == [(3, 4, 5), (3, 4, 6)]
    assert [c.tokens for c in stream.claims[4:]] == [(3, 7), (3, 8)]
    assert graph.fed[-1][2].tolist() == [[1], [1]]
    assert graph.fed[-1][3] == (2, 1, 2, 1)


def test_a_context_too_long_for_float64_is_tested_at_its_last_positions():
    graph = Recorder()
    stage = Stage(
        graph=graph, whole=graph, growing=graph, padding="any", by_column=False, keeps=False,
        causal=True, vocab_size=10, block_size=10**6, parameters=10**9,
    )  # fmt: skip
    (stream,) = context_edge(stage)
    assert graph.fed[-1][2].tolist() == [[10**6 - 1]]
    assert sum(ids.shape[1] for ids, *_ in graph.fed) == 16
    assert all(each.offset == 10**6 - 16 for each in stream.claims)
