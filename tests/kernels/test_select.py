"""The choice of a body: explained, said once, and never a silent fallback."""

import importlib.util
import logging
import os
import subprocess
import sys

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


@pytest.fixture
def untold(monkeypatch):
    """As in a process that has said and found out nothing yet."""
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(select, "_found", {})


def test_triton_without_a_gpu_is_an_error_with_the_reason(calls, untold, monkeypatch):
    monkeypatch.setattr(select, "_find", lambda operator, device: select._device_obstacle(device))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, call in calls.items():
        with pytest.raises(
            kernels.KernelUnavailable, match=rf"{name}: .* need a GPU, .* on cpu; use impl="
        ):
            call("triton")
        call("auto")


def test_obstacles_are_told_in_their_order(untold, monkeypatch):
    cpu, missing = torch.device("cpu"), set()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a GPU" in select._find("layernorm", cpu)
    missing.add("triton")
    assert select._find("layernorm", cpu) == "triton is not installed"
    missing.add("gptopt.kernels.layernorm.triton")
    assert select._find("layernorm", cpu) == "no Triton kernel of this operator exists yet"


def test_a_choice_on_the_cpu_loads_no_kernels():
    code = (
        "import sys, torch; from gptopt import kernels;"
        "kernels.layernorm(torch.ones(2, 4), None, None); kernels.explain('cpu');"
        "assert 'gptopt.kernels.launch' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment)


def test_auto_says_in_one_line_what_is_true_of_all(calls, untold, monkeypatch, caplog):
    monkeypatch.setattr(select, "_find", lambda operator, device: "they sleep")
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for _ in range(2):
            for call in calls.values():
                call("auto")
                call("reference")
    assert [record.getMessage() for record in caplog.records] == [
        "operators run their reference bodies: they sleep"
    ]


def test_auto_says_once_for_each_operator_where_they_differ(calls, untold, monkeypatch, caplog):
    monkeypatch.setattr(select, "_find", lambda operator, device: f"{operator} sleeps")
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for _ in range(3):
            for call in calls.values():
                call("auto")
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} runs its reference body: {name} sleeps" for name in calls
    ]


def test_reference_says_nothing(calls, monkeypatch, caplog):
    monkeypatch.setattr(select, "_told", set())
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


def test_the_reason_names_the_device(untold, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.explain("cpu")["layernorm"] == (
        "reference",
        "Triton kernels need a GPU, and the tensors are on cpu",
    )


def test_auto_takes_no_kernel_that_is_not_proven(calls, untold, monkeypatch):
    doubts = {"ffn": "its Triton kernels are wrong on this machine: y"}
    monkeypatch.setattr(select, "_find", lambda operator, device: None)
    monkeypatch.setattr(select, "_unproven", lambda operator, *_: doubts.get(operator))
    table = kernels.explain("cuda")
    assert table["ffn"] == ("reference", doubts["ffn"])
    assert table["rotary"] == ("triton", "proven on this machine")
    x = torch.randn(2, 4)
    assert not select.runs_triton("ffn", "auto", x)
    assert select.runs_triton("ffn", "triton", x)


def test_unsupported_arguments_are_told_once_or_refused(untold, monkeypatch, caplog):
    monkeypatch.setattr(select, "_find", lambda operator, device: None)
    monkeypatch.setattr(select, "_unproven", lambda operator, *_: None)
    supports = {"ffn": lambda x: f"a width of {x.shape[-1]} is odd"}
    monkeypatch.setattr(select.library, "SUPPORTS", supports)
    x = torch.randn(2, 5)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for _ in range(3):
            assert not select.runs_triton("ffn", "auto", x, x)
    said = [r.getMessage() for r in caplog.records if "here" in r.getMessage()]
    assert said == ["ffn runs its reference body here: a width of 5 is odd"]
    with pytest.raises(kernels.KernelUnavailable, match="a width of 5 is odd; use impl="):
        select.runs_triton("ffn", "triton", x, x)
