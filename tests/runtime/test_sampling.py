"""The filters, each against its definition, in numpy and in torch alike."""

import numpy as np
import pytest
import torch

from gptopt import sampling as in_torch
from gptopt.config import SamplingOptions
from gptopt.errors import CheckFailed
from gptopt.runtime import sampling as in_numpy

LOGITS = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=np.float32))


def both(scores, **options):
    """The distribution by numpy, after torch's was found equal."""
    sampling = SamplingOptions(**{"temperature": 1.0, **options})
    p = in_numpy.probabilities(scores, sampling)
    np.testing.assert_allclose(
        in_torch.probabilities(torch.from_numpy(scores), sampling).numpy(), p, atol=1e-12
    )
    return p


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.65}, [0.4, 0.3, 0, 0, 0]),  # the token that crosses P stays
        ({"top_p": 0.01}, [0.4, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
        # top-p sees what top-k left, renormalised: 0.4 / 0.7 = 0.57 reaches 0.5 alone
        ({"top_k": 2, "top_p": 0.5}, [0.4, 0, 0, 0, 0]),
        ({"top_k": 4, "top_p": 0.7, "min_p": 0.8}, [0.4, 0, 0, 0, 0]),
    ],
)
def test_filters_mean_what_they_say(options, expected):
    expected = np.array([expected]) / np.sum(expected)
    np.testing.assert_allclose(both(LOGITS, **options), expected, atol=1e-6)


def test_equal_scores_are_kept_together():
    scores = np.array([[1.0, 3.0, 3.0, 3.0, 0.0]], dtype=np.float32)
    third = [[0, 1 / 3, 1 / 3, 1 / 3, 0]]
    np.testing.assert_allclose(both(scores, top_k=2), third)
    np.testing.assert_allclose(both(scores, top_p=0.4), third)


@pytest.mark.parametrize("seed", range(8))
def test_torch_and_numpy_filter_alike(seed):
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((3, 97)) * 3).astype(np.float32)
    sampling = SamplingOptions(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.integers(0, 60)),
        top_p=float(rng.uniform(0.3, 1)),
        min_p=float(rng.uniform(0, 0.1)),
        repetition_penalty=float(rng.uniform(0.7, 1.5)),
    )
    seen = rng.random((3, 90)) < 0.3
    draws = rng.random(3)
    penalised = in_numpy.penalised(scores[:, :90], sampling, seen)
    both(penalised, **sampling.model_dump(include={"temperature", "top_k", "top_p", "min_p"}))
    found = in_torch.choose(
        torch.from_numpy(scores), 90, sampling, torch.from_numpy(seen), torch.from_numpy(draws)
    )
    assert found.tolist() == in_numpy.choose(scores, 90, sampling, seen, draws).tolist()


def test_the_repetition_penalty_lowers_scores_of_either_sign():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], dtype=np.float32)
    seen = np.array([[True, True, False, False]])
    sampling = SamplingOptions(repetition_penalty=2.0)
    np.testing.assert_array_equal(in_numpy.penalised(logits, sampling, seen), [[1, -4, 2, -2]])
    as_torch = in_torch.penalised(torch.from_numpy(logits), sampling, torch.from_numpy(seen))
    np.testing.assert_array_equal(as_torch.numpy(), [[1, -4, 2, -2]])


def choices(logits, sampling, size=5, draws=None, rows=1):
    draws = np.full(rows, 0.5) if draws is None else draws
    found = in_numpy.choose(logits, size, sampling, None, draws)
    twin = in_torch.choose(torch.from_numpy(logits), size, sampling, None, torch.from_numpy(draws))
    assert twin.tolist() == found.tolist()
    return found.tolist()


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits = np.array([[0.0, 5.0, 5.0, 1.0, 9.0], [1.0, 0.0, 0.0, 2.0, 9.0]], dtype=np.float32)
    greedy = SamplingOptions(temperature=0, top_p=0.1, min_p=0.9, top_k=1)
    assert choices(logits, greedy, size=4, rows=2) == [1, 3]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.65}, {"min_p": 0.3}])
def test_extreme_draws_pick_tokens_that_have_mass(options):
    logits = np.array([[-np.inf, 1.0, 3.0, 2.0, -np.inf]] * 2, dtype=np.float32)
    sampling = SamplingOptions(temperature=1.0, **options)
    allowed = np.flatnonzero(both(logits[:1], **options)[0])
    found = choices(logits, sampling, draws=np.array([0.0, 1 - 2**-53]))
    assert found == [allowed[0], allowed[-1]] or found == [allowed[-1], allowed[0]]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_samples_follow_the_filtered_distribution(options):
    sampling = SamplingOptions(**{"temperature": 1.0, **options})
    N = 20000
    draws = np.random.default_rng(7).random(N)
    found = choices(np.repeat(LOGITS, N, axis=0), sampling, draws=draws)
    expected = both(LOGITS, **options)[0] * N
    counts = np.bincount(found, minlength=5)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_refused(bad, temperature):
    logits = np.array([[0.0, bad, 1.0]], dtype=np.float32)
    sampling, draws = SamplingOptions(temperature=temperature), np.array([0.5])
    with pytest.raises(CheckFailed, match="not finite"):
        in_numpy.choose(logits, 3, sampling, None, draws)
    with pytest.raises(CheckFailed, match="not finite"):
        in_torch.choose(torch.from_numpy(logits), 3, sampling, None, torch.from_numpy(draws))


def test_padding_may_be_anything():
    logits = np.array([[0.0, 1.0, np.nan]], dtype=np.float32)
    assert choices(logits, SamplingOptions(temperature=0), size=2) == [1]
