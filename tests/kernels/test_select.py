"""The choice of a body: explained, said once, and never a silent fallback."""

import logging

import pytest
import torch

from gptopt import kernels
from gptopt.kernels import select


@pytest.fixture
def calls():
    """One small call of every operator, by `impl`."""
    x, weight = torch.randn(2, 4), torch.randn(6, 4)
    q, table, targets = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 2), torch.tensor([0, 1])
    cache = kernels.StaticCache(1, 1, 2, 5, 4)
    return {
        "attention": lambda impl: kernels.attention(q, q, q, impl=impl),
        "attention_decode": lambda impl: kernels.attention_decode(
            q, q, q, cache[0], cache.lengths, impl=impl
        ),
        "layernorm": lambda impl: kernels.layernorm(x, None, None, impl=impl),
        "ffn": lambda impl: kernels.ffn(x, weight, None, activation="relu", impl=impl),
        "cross_entropy": lambda impl: kernels.cross_entropy(x, weight, targets, impl=impl),
        "rotary": lambda impl: kernels.rotary(q, q, table, table, impl=impl),
    }


def test_every_operator_is_listed_and_registered(calls):
    assert set(kernels.OPERATORS) == set(calls)
    for name in kernels.OPERATORS:
        assert callable(getattr(kernels, name))
        assert hasattr(torch.ops.gptopt, name)


def test_triton_that_cannot_run_is_an_error_with_the_reason(calls):
    for name, call in calls.items():
        if name not in select.TRITON_OPERATORS:
            with pytest.raises(
                kernels.KernelUnavailable, match=f"{name}: impl='triton'.*no Triton"
            ):
                call("triton")


def test_triton_without_a_gpu_is_an_error_with_the_reason(calls, monkeypatch):
    monkeypatch.setattr(select, "TRITON_OPERATORS", frozenset(kernels.OPERATORS))
    for call in calls.values():
        with pytest.raises(kernels.KernelUnavailable, match=r"need a GPU, .* on cpu; use impl="):
            call("triton")
        call("auto")


def test_auto_says_once_which_body_runs_and_why(calls, monkeypatch, caplog):
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(logging.getLogger("gptopt"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for _ in range(3):
            for call in calls.values():
                call("auto")
                call("reference")
    assert len(caplog.records) == len(calls)
    for name, record in zip(calls, caplog.records, strict=True):
        assert record.levelno == logging.INFO
        assert record.getMessage().startswith(f"{name} runs its reference body: ")


def test_reference_says_nothing(calls, monkeypatch, caplog):
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(logging.getLogger("gptopt"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for call in calls.values():
            call("reference")
    assert not caplog.records


def test_explain_gives_a_body_and_a_reason_for_every_operator():
    for device in ("cpu", torch.device("cuda", 0)):
        table = kernels.explain(device)
        assert list(table) == list(kernels.OPERATORS)
        for body, reason in table.values():
            assert body in ("reference", "triton")
            assert reason
    assert all(body == "reference" for body, _ in kernels.explain("cpu").values())


def test_the_reason_names_the_device(monkeypatch):
    monkeypatch.setattr(select, "TRITON_OPERATORS", frozenset(kernels.OPERATORS))
    assert kernels.explain("cpu")["ffn"] == (
        "reference",
        "Triton kernels need a GPU, and the tensors are on cpu",
    )
    assert kernels.explain("cuda")["ffn"] == ("triton", "tensors on cuda")
