"""hf:org/name[@revision]: one download call, nothing but weights and text, and clear failures."""

import sys
from pathlib import Path

import pytest

from gptopt import hub
from gptopt.checkpoint import resolve_model
from gptopt.errors import UserError


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace the download by one that records its arguments."""
    import huggingface_hub

    seen = []

    def snapshot_download(repository, **options):
        seen.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return seen


@pytest.mark.parametrize(
    ("reference", "repository", "revision"),
    [
        ("hf:org/name", "org/name", None),
        ("hf:org/na.me-2_x@main", "org/na.me-2_x", "main"),
        ("hf:gpt2@refs/pr/3", "gpt2", "refs/pr/3"),
    ],
)
def test_a_reference_becomes_one_download(calls, tmp_path, reference, repository, revision):
    assert resolve_model(reference) == tmp_path
    [(name, options)] = calls
    assert (name, options["revision"]) == (repository, revision)
    assert set(options["allow_patterns"]) == {"*.safetensors", "*.json", "*.txt", "*.jinja"}


def test_only_weights_and_text_are_wanted():
    """What the patterns let through, judged by the hub's own filter."""
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "merges.txt",
        "chat_template.jinja", "pytorch_model.bin", "modeling.py", "tokenizer.model", "rng.pt",
        "onnx/config.json", "original/consolidated.00.safetensors", "consolidated.safetensors",
    ]  # fmt: skip
    kept = filter_repo_objects(files, allow_patterns=hub._WANTED, ignore_patterns=hub._UNWANTED)
    assert list(kept) == files[:5]


@pytest.mark.parametrize(
    "reference", ["hf:", "hf:a/b/c", "hf:../x", "hf:a/b@", "hf:a b", "hf:a/b@x;y"]
)
def test_malformed_references_are_refused(calls, reference):
    with pytest.raises(UserError, match="expected hf:org/name"):
        resolve_model(reference)
    assert not calls


def test_without_the_package_or_the_network(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"download failed \(ConnectionError: no route to host\)"):
        hub.download("hf:org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed"):
        hub.download("hf:org/name")


def test_the_package_is_not_imported_for_local_folders(tmp_path):
    import subprocess

    code = (
        "import sys, gptopt.checkpoint as c\n"
        f"try: c.resolve_model({str(tmp_path)!r})\n"
        "except c.UserError: pass\n"
        "sys.exit('huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=Path("/")).returncode == 0
