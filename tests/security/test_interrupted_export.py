"""Exports that end early, by a full disk or Ctrl-C, and folders that stand there: none by half."""

import contextlib
import functools
import signal
import sys

import pytest

from gptopt.checkpoint import save_model
from gptopt.cli import main
from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.export import export_model, package, prove
from gptopt.model import GPT
from gptopt.runtime.folder import verify_folder

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=512)


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG, kernels="reference").eval()


@pytest.fixture(scope="module")
def common():
    """What is recorded of the model once."""
    return package.Common()


@pytest.fixture(autouse=True)
def _short_proof(monkeypatch):
    monkeypatch.setattr(package, "prove", functools.partial(prove, cases=["prefill"]))


@contextlib.contextmanager
def files_end_at(size):
    """As on a full disk: no file of this process can become longer."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead of the end
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@posix
@pytest.mark.parametrize("size", [0, 40_000])
def test_a_disk_that_fills_leaves_nothing(model, common, tmp_path, size):
    """Not even the graph fits, or not its weights."""
    message = r"cannot be written \(File too large\)"
    with pytest.raises(UserError, match=message) as caught, files_end_at(size):
        export_model(model, None, tmp_path / "edge", common=common)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_disk_that_fills_after_the_proof_keeps_the_folder_that_was_there(
    model, common, tmp_path, monkeypatch
):
    edge = tmp_path / "edge"
    edge.mkdir()
    (edge / "mine").write_text("kept")
    write_manifest = package.write_manifest

    def full(*given):
        with files_end_at(100):
            write_manifest(*given)

    monkeypatch.setattr(package, "write_manifest", full)
    with pytest.raises(UserError, match="free space, then run the same command again"):
        export_model(model, None, edge, force=True, common=common)
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]
    assert [path.name for path in edge.iterdir()] == ["mine"]


def interrupt_after(stage, monkeypatch):
    run = getattr(package, stage)

    def interrupted(*given, **named):
        run(*given, **named)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(package, stage, interrupted)


@pytest.mark.parametrize("stage", ["build_graph", "save", "prove", "write_configs", "model_card"])
def test_ctrl_c_leaves_nothing_at_any_stage(model, common, tmp_path, monkeypatch, stage):
    interrupt_after(stage, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, None, tmp_path / "edge", common=common)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_one_line_after_ctrl_c(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, None)
    interrupt_after("write_manifest", monkeypatch)
    command = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "edge")]
    assert main(command) == 130
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.splitlines()[-1].endswith("interrupted; nothing half-written was left")
    assert "Traceback" not in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_stands_there_stays_until_another_one_is_whole(
    model, common, tmp_path, monkeypatch
):
    edge = tmp_path / "edge"
    export_model(model, None, edge, common=common)
    before = {path: path.read_bytes() for path in edge.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists already; choose another folder, or replace it"):
        export_model(model, None, edge, common=common)
    seen = []
    run = package.prove

    def look(*given, **named):
        seen.append({path: path.read_bytes() for path in before})
        return run(*given, **named)

    monkeypatch.setattr(package, "prove", look)
    (edge / "stray").write_text("of somebody")
    export_model(model, None, edge, force=True, common=common)
    assert seen == [before]
    verify_folder(edge)  # and the stray file is gone
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]


@posix
def test_a_link_in_the_place_of_the_folder_is_not_followed(model, common, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("kept")
    (tmp_path / "edge").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="exists already"):
        export_model(model, None, tmp_path / "edge", common=common)
    export_model(model, None, tmp_path / "edge", force=True, common=common)
    assert (tmp_path / "elsewhere" / "mine").read_text() == "kept"
    assert not (tmp_path / "edge").is_symlink()
    verify_folder(tmp_path / "edge")
