"""The cache of proofs where it is broken, foreign or read-only: a new proof, never an error."""

import logging

import pytest

from gptopt.kernels import proof


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(proof, "_remembered", {})
    return tmp_path


PASSED = proof.ProofResult("rotary", True, 9, 0.5, "")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00 no text",
        b'{"operators": {"rotary": {"operator": "rotary", "passed": "no", "cases": 9,'
        b' "worst": 0.5, "reason": ""}}}',
        b'{"operators": {"rotary": {"operator": "ffn", "passed": true, "cases": 9,'
        b' "worst": 0.5, "reason": ""}}}',
        b'{"operators": {"rotary": null}}',
        b'{"operators": ["rotary"]}',
        b'{"operators": {"rotary"',
    ],
)
def test_a_corrupted_stamp_proves_nothing(device, cache, monkeypatch, caplog, content):
    proof.remember(PASSED, device)
    (stamp,) = (cache / "proofs").iterdir()
    stamp.write_bytes(content)
    monkeypatch.setattr(proof, "_remembered", {})
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        assert proof.recall("rotary", device) is None
    assert "proving again" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def test_a_stamp_that_is_a_folder_or_of_another_machine_proves_nothing(device, cache, monkeypatch):
    proof.remember(PASSED, device)
    (stamp,) = (cache / "proofs").iterdir()
    text = stamp.read_text()
    stamp.unlink()
    stamp.mkdir()
    monkeypatch.setattr(proof, "_remembered", {})
    assert proof.recall("rotary", device) is None
    proof.remember(PASSED, device)  # told, not raised
    assert proof.recall("rotary", device) == PASSED
    stamp.rmdir()
    stamp.write_text(text.replace('"triton": "', '"triton": "another '))
    monkeypatch.setattr(proof, "_remembered", {})
    assert proof.recall("rotary", device) is None


def test_a_read_only_cache_is_told_and_costs_nothing_else(device, cache, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(cache))

    monkeypatch.setattr(proof.tempfile, "mkstemp", refuse)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        proof.remember(PASSED, device)
    (record,) = caplog.records
    assert record.getMessage().startswith("the proof of rotary is not kept: ")
    assert proof.recall("rotary", device) == PASSED
    assert not list(cache.rglob("*.json"))
