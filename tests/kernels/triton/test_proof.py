"""The proof and its stamp: right kernels are used, wrong ones are not, and it runs once."""

import importlib
import json
import logging

import pytest
import torch

from gptopt.kernels import layernorm, library, proof, select


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in a process that remembers nothing."""
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(proof, "_remembered", {})
    return tmp_path


@pytest.fixture
def proving(cache, monkeypatch):
    """ "auto" asks for a proof in the interpreter, as it does on a GPU."""
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(select, "_unproven", proof.doubt)


@pytest.fixture
def wrong_kernel(monkeypatch):
    """The launchers of layernorm with a result that is a little too large."""
    module = importlib.import_module("gptopt.kernels.layernorm.triton")
    launch = module.launch

    def spoiled(kernel, grid, x, *arguments, **options):
        launch(kernel, grid, x, *arguments, **options)
        if kernel is module.layernorm_fwd_kernel:
            arguments[5].mul_(1.01)

    monkeypatch.setattr(module, "launch", spoiled)


def test_a_wrong_kernel_fails_with_the_reason(device, wrong_kernel):
    result = proof.prove("layernorm", device)
    assert not result.passed
    assert result.worst > 1.0
    assert result.reason.startswith("layer 24 float32: result 0 has error")


def test_a_kernel_that_raises_fails_with_the_reason(device, monkeypatch):
    module = importlib.import_module("gptopt.kernels.layernorm.triton")

    def broken(*_, **__):
        raise RuntimeError("no such\n  instruction\n")

    monkeypatch.setattr(module, "launch", broken)
    result = proof.prove("layernorm", device)
    assert not result.passed
    assert "RuntimeError: no such instruction" in result.reason


def test_auto_proves_once_says_so_and_leaves_a_stamp(device, cache, proving, monkeypatch, caplog):
    x = torch.randn(3, 8, device=device)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        for _ in range(2):
            assert select.runs_triton("layernorm", "auto", x)
    said = [r.getMessage() for r in caplog.records if "proving" in r.getMessage()]
    assert len(said) == 1
    (stamp,) = (cache / "proofs").iterdir()
    content = json.loads(stamp.read_text())
    assert set(content["machine"]) == {"name", "arch", "torch", "triton", "sources"}
    assert content["operators"]["layernorm"]["passed"]
    # Another process reads the stamp instead of proving.
    monkeypatch.setattr(proof, "_remembered", {})
    monkeypatch.setattr(proof, "prove", lambda *_: pytest.fail("proved again"))
    assert select.runs_triton("layernorm", "auto", x)


def test_auto_uses_no_wrong_kernel_and_remembers_it(
    device, cache, proving, wrong_kernel, monkeypatch
):
    x = torch.randn(3, 8, device=device)
    weight = torch.randn(8, device=device)
    found, _ = layernorm(x, weight, None)
    expected, _ = layernorm(x, weight, None, impl="reference")
    assert torch.equal(found, expected)
    (stamp,) = (cache / "proofs").iterdir()
    assert not json.loads(stamp.read_text())["operators"]["layernorm"]["passed"]
    monkeypatch.setattr(proof, "_remembered", {})
    assert "wrong on this machine: layer 24" in proof.doubt("layernorm", device)


def test_other_sources_need_another_proof(device, cache, monkeypatch):
    proof.remember(proof.ProofResult("rotary", True, 9, 0.5, ""), device)
    monkeypatch.setattr(proof, "_remembered", {})
    assert proof.recall("rotary", device) is not None
    monkeypatch.setattr(proof, "_remembered", {})
    monkeypatch.setattr(proof, "_sources", lambda: "changed")
    assert proof.recall("rotary", device) is None
    assert "not proven" in proof.doubt("rotary", device, False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"operators": {"rotary": {"passed": true}}}'])
def test_a_broken_stamp_is_proven_again(device, cache, monkeypatch, caplog, text):
    result = proof.ProofResult("rotary", True, 9, 0.5, "")
    proof.remember(result, device)
    (stamp,) = (cache / "proofs").iterdir()
    stamp.write_text(text)
    monkeypatch.setattr(proof, "_remembered", {})
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        assert proof.recall("rotary", device) is None
    assert "is not a proof stamp" in caplog.text
    proof.remember(result, device)
    assert json.loads(stamp.read_text())["operators"]["rotary"]["passed"]


def test_a_cache_that_cannot_be_written_costs_a_proof_and_no_error(device, cache, caplog):
    (cache / "proofs").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        assert proof.doubt("rotary", device) is None
    assert "is not kept" in caplog.text
    assert proof.recall("rotary", device).passed


def test_stamps_of_two_operators_live_side_by_side_and_can_be_forgotten(device, cache, monkeypatch):
    for operator in ("rotary", "ffn"):
        proof.remember(proof.ProofResult(operator, True, 9, 0.5, ""), device)
    monkeypatch.setattr(proof, "_remembered", {})
    assert all(proof.recall(operator, device) for operator in ("rotary", "ffn"))
    proof.forget(device)
    assert not any(proof.recall(operator, device) for operator in ("rotary", "ffn"))


def test_the_interpreter_is_never_chosen_by_auto(device):
    if device.type == "cpu":
        _, reason = select.explain(device)["layernorm"]
        assert "interpreter" in reason
        assert "layernorm" in library.SUPPORTS
