"""Each operator's own proof: it passes with the kernels that ship, and fails with wrong ones."""

import functools
import importlib
import json
import logging
import sys

import pytest

from gptopt.kernels import launch, proof, proof_cases, select

KERNELS = {  # one of each operator's, and the argument that it writes its result to
    "attention": ("attention.triton_forward", "attention_fwd_kernel", "out"),
    "attention_decode": ("attention.triton_decode", "attention_decode_kernel", "out"),
    "layernorm": ("layernorm.triton", "layernorm_fwd_kernel", "y_ptr"),
    "ffn": ("ffn.triton", "ffn_fwd_kernel", "out_ptr"),
    "cross_entropy": ("cross_entropy.triton", "cross_entropy_fwd_kernel", "logits_ptr"),
    "rotary": ("rotary.triton", "rotary_kernel", "k_out_ptr"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in a process that remembers nothing; `auto` asks for proofs."""
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(proof, "_remembered", {})
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(select, "_unproven", proof.doubt)
    return tmp_path


@pytest.fixture
def spoil(monkeypatch):
    """spoil(operator): from now on one of its kernels writes a result a little too large.

    Returns the list of all kernels launched since.
    """

    def start(operator: str) -> list[str]:
        path, kernel, argument = KERNELS[operator]
        module = importlib.import_module(f"gptopt.kernels.{path}")
        kernel, launched, real = getattr(module, kernel), [], launch.launch

        def wrong(started, grid, x, *arguments, **options):
            real(started, grid, x, *arguments, **options)
            launched.append(started.__name__)
            if started is kernel:
                given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
                if given[argument] is not None:
                    given[argument].mul_(1.05)

        for name, loaded in list(sys.modules.items()):
            if name.startswith("gptopt.kernels.") and getattr(loaded, "launch", None) is real:
                monkeypatch.setattr(loaded, "launch", wrong)
        return launched

    return start


LONG = ("attention", "cross_entropy")
EACH = [
    pytest.param(operator, marks=[pytest.mark.slow] * (operator in LONG))
    for operator in select.OPERATORS
]


@pytest.mark.parametrize("operator", EACH)
def test_the_kernels_that_ship_pass(device, cache, operator):
    assert proof.doubt(operator, device) is None
    (stamp,) = (cache / "proofs").iterdir()
    found = json.loads(stamp.read_text())["operators"][operator]
    assert found["passed"]
    assert found["cases"] == len(list(proof_cases.cases(operator, device)))
    assert 0.0 < found["worst"] <= 1.0


@pytest.mark.parametrize("operator", select.OPERATORS)
def test_a_wrong_kernel_fails_and_auto_runs_the_reference(
    device, cache, operators, spoil, caplog, operator
):
    call, again = (operators()[operator] for _ in range(2))
    launched = spoil(operator)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        found = call.function("auto")(*call.leaves)
    assert launched, "the proof ran no kernel"
    said = [record.getMessage() for record in caplog.records]
    assert sum("proving its Triton kernels" in line for line in said) == 1
    (reason,) = (line for line in said if "reference" in line)
    assert "wrong on this machine: " in reason
    assert "has error" in reason
    launched.clear()
    expected = again.function("reference")(*again.leaves)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    call.function("auto")(*call.leaves)
    assert not launched, "a kernel that is known to be wrong was used"
    assert not proof.recall(operator, device).passed


def test_a_wrong_backward_alone_fails(device, cache, monkeypatch):
    """The gradients are part of the proof."""
    module = importlib.import_module("gptopt.kernels.rotary.triton")
    rotate = module._rotate
    monkeypatch.setattr(
        module, "_rotate", functools.wraps(rotate)(lambda *x, opposite: rotate(*x, opposite=False))
    )
    result = proof.prove("rotary", device)
    assert not result.passed
    assert "result 2" in result.reason  # after q and k, the gradient of q
