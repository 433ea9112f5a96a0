"""Resume: an interrupted run and an uninterrupted one cannot be told apart."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gptopt.errors import CheckFailed, UserError
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.loop import Trainer
from gptopt.training.metrics import read_metrics
from gptopt.training.saving import Snapshot
from gptopt.training.session import Session
from gptopt.training.step import Stepper

LEARNED = ("loss", "lr", "grad_norm", "tokens", "skipped", "val_loss")
COUNTED = ("step", "tokens", "skipped", "loss_sum", "loss_count", "train_loss", "val_loss")


class Killed(BaseException):
    """Ends a run in this process as abruptly as Python can."""


@pytest.fixture
def kill(monkeypatch):
    """`kill(owner, name, step)`: die on entering a method at a step."""

    def at(owner, name, step):
        original = getattr(owner, name)

        def deadly(self, *arguments):
            state = getattr(self, "state", None) or self.session.state
            saved = [argument for argument in arguments if isinstance(argument, Snapshot)]
            if (saved or [state])[0].step == step:  # the thread that saves may lag behind
                raise Killed
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, deadly)
        return lambda: monkeypatch.setattr(owner, name, original)

    return at


def assert_same_run(left, right, step):
    """Weights, moments, generators, counters, data position and every loss, bit for bit."""
    a, b = (Checkpoints(run).of(step) for run in (left, right))
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [json.loads((folder / "state.json").read_text()) for folder in (a, b)]
    assert states[0]["random"] == states[1]["random"]
    assert states[0]["fixed"] == states[1]["fixed"]
    trained = [state["train"] for state in states]
    for key in (*COUNTED, "best_val_loss", "best_step", "sampler", "scaler"):
        assert trained[0][key] == trained[1][key], key
    lines = [
        [(line["step"], *(line.get(key) for key in LEARNED)) for line in read_metrics(path)]
        for path in (left / "metrics.jsonl", right / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert (left / "best").read_text() == (right / "best").read_text()


VARIANTS = {
    "plain": {},
    "dropout and accumulation": {"accumulate": 2, "model": {"dropout": 0.2}},
    "several epochs": {"batch_size": 60, "steps": 14},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "untied, rotary, gated": {
        "model": {"tie_head": False, "position": "rotary", "activation": "swiglu", "dropout": 0.1}
    },
    "lines far apart": {"log_every": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_exact(options, tmp_path, kill, variant):
    changes = {"steps": 8, "checkpoint_every": 3, "eval_every": 4} | VARIANTS[variant]
    train(options("straight", **changes))
    unharmed = kill(Stepper, "step", 5)
    with pytest.raises(Killed):
        train(options("killed", **changes))
    unharmed()
    result = train(options("killed", resume=True, **changes))
    # Step 4 was evaluated, hence saved as the best; the kill came after step 5.
    assert result["resumed_from"] == 4
    assert_same_run(tmp_path / "straight", tmp_path / "killed", changes["steps"])


@pytest.mark.parametrize(
    ("owner", "name", "step", "resumed_from"),
    [
        (Trainer, "_finish", 4, 4),  # saved, not yet evaluated
        (Trainer, "_show", 4, 4),  # evaluated and written, the best not yet marked
        (Session, "write", 4, 2),  # half-way into a save
        (Trainer, "_finish", 8, 8),  # the last step, not yet evaluated
    ],
)
def test_resume_is_bit_exact_wherever_the_run_died(
    options, tmp_path, kill, owner, name, step, resumed_from
):
    changes = {"steps": 8, "eval_every": 4, "sample_every": 4, "model": {"dropout": 0.1}}
    train(options("straight", **changes))
    unharmed = kill(owner, name, step)
    with pytest.raises(Killed):
        train(options("killed", **changes))
    unharmed()
    result = train(options("killed", resume=True, **changes))
    assert result["resumed_from"] == resumed_from
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 8)
    samples = [sorted(p.name for p in (tmp_path / run / "samples").iterdir())
               for run in ("straight", "killed")]  # fmt: skip
    assert samples[0] == samples[1]


def test_the_test_of_exactness_can_fail(options, tmp_path):
    train(options("a", eval_every=2))
    train(options("b", eval_every=2, seed=6))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "b", 6)


def test_a_moment_forgotten_would_be_seen(options, tmp_path, monkeypatch):
    """Resuming without the optimiser's state gives other weights: the comparison is not blind."""
    train(options("straight", eval_every=2))
    train(options("forgetful", eval_every=2, steps=4))
    monkeypatch.setattr("gptopt.training.session.load_optimiser_tensors", lambda *arguments: None)
    train(options("forgetful", eval_every=2, resume=True))
    files = [Checkpoints(tmp_path / run).of(6) / "model.safetensors"
             for run in ("straight", "forgetful")]  # fmt: skip
    assert files[0].read_bytes() != files[1].read_bytes()


def test_resume_starts_a_run_where_there_is_none(options):
    result = train(options(resume=True))
    assert result["resumed_from"] is None
    assert result["steps"] == 6


def test_resume_of_a_complete_run_says_so_and_changes_nothing(options, tmp_path, caplog):
    caplog.set_level("INFO", "gptopt")
    first = train(options())
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    again = train(options(resume=True))
    assert again == {**first, "already_complete": True}
    assert "complete at step 6" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_run_may_go_on_for_more_steps_with_other_intervals(options, tmp_path):
    train(options(steps=4))
    result = train(options(steps=8, resume=True, log_every=3, eval_every=2, checkpoint_every=5))
    assert (result["steps"], result["resumed_from"]) == (8, 4)
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [
        1, 2, 3, 4, 6, 8,
    ]  # fmt: skip


def test_a_run_that_ended_by_time_is_complete_until_it_gets_more(options):
    timed = {"steps": 10**6, "checkpoint_every": 0}
    first = train(options(max_seconds=0.3, **timed))
    assert train(options(max_seconds=0.3, resume=True, **timed))["already_complete"]
    more = train(options(max_seconds=0.6, resume=True, **timed))
    assert more["steps"] > first["steps"]
    assert more["seconds"] > first["seconds"]


def test_an_existing_run_is_not_overwritten(options):
    train(options())
    with pytest.raises(UserError, match=r"step-000006.*--resume, or choose another --out"):
        train(options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 3e-3}, r"another lr: the run has 0\.001, this command says 0\.003"),
        ({"batch_size": 4}, "another batch_size: the run has 3, this command says 4"),
        ({"accumulate": 2}, "another accumulate"),
        ({"seed": 9}, "another seed: the run has 5, this command says 9"),
        ({"weight_decay": 0.0}, "another weight_decay"),
        ({"beta2": 0.99}, "another beta2"),
        ({"dtype": "bfloat16"}, "another dtype: the run has float32, this command says bfloat16"),
        ({"model": {"n_layer": 2}}, r"another model\.n_layer: the run has 1, .* says 2"),
        ({"model": {"dropout": 0.1}}, r"another model\.dropout"),
        ({"data": {"kind": "bpe"}}, "tokenised from other options"),
    ],
)
@pytest.mark.parametrize("steps", [6, 8])  # complete already, and not
def test_resume_refuses_what_may_not_change(options, tmp_path, finished, change, message, steps):
    shutil.copytree(finished, tmp_path / "run")
    if steps == 6 and change.keys() & {"dtype", "data"}:
        pytest.skip("a complete run opens neither device nor text")
    with pytest.raises(UserError, match=message):
        train(options(resume=True, steps=steps, **change))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """One finished run for all that only look at it."""
    from gptopt.config import TrainOptions

    out = tmp_path_factory.mktemp("finished") / "run"
    train(
        TrainOptions.model_validate(
            {
                "inputs": [str(corpus)], "out": str(out), "steps": 6, "batch_size": 3,
                "warmup_steps": 2, "eval_every": 0, "eval_batches": 2, "checkpoint_every": 2,
                "log_every": 1, "seed": 5, "device": "cpu", "json": True, "data": {"kind": "char"},
                "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
            }
        )
    )  # fmt: skip
    return out


def test_resume_refuses_other_text(options, tmp_path, finished, corpus):
    shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text()[::-1])
    with pytest.raises(UserError, match="tokenised from other text"):
        train(options(resume=True, steps=8, inputs=[str(other)]))
    data = train(options("elsewhere", steps=1, inputs=[str(other)]))["out"] + "/data"
    with pytest.raises(UserError, match=r"another data: the run has sha256 \w{12}"):
        train(options(resume=True, steps=8, inputs=[data]))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    options, tmp_path, finished, caplog
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = run / "checkpoints/step-000006/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = train(options(resume=True))
    assert "step-000006: damaged and skipped" in caplog.text
    assert result["resumed_from"] == 4
    intact = finished / "checkpoints/step-000006/model.safetensors"
    assert weights.read_bytes() == intact.read_bytes()


def test_only_damaged_checkpoints_are_an_error(options, tmp_path, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(options(resume=True))


def test_a_checkpoint_of_another_version_is_refused(options, tmp_path, finished):
    from gptopt.manifest import write_manifest

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    folder = run / "checkpoints/step-000006"
    state = json.loads((folder / "state.json").read_text())
    del state["train"]["sampler"]
    (folder / "state.json").write_text(json.dumps(state))
    write_manifest(folder, "checkpoint")
    with pytest.raises(CheckFailed, match="'sampler' is missing or unknown"):
        train(options(resume=True, steps=8))


def test_a_resume_elsewhere_says_that_bits_may_differ(options, tmp_path, finished, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(environment | {"torch": "2.0.0"}))
    train(options(resume=True, steps=8))
    assert f"torch was 2.0.0 and is {torch.__version__} now" in caplog.text


def test_leftovers_of_a_killed_writer_are_removed(options, tmp_path, finished, caplog):
    caplog.set_level("INFO", "gptopt")
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    leftover = run / "checkpoints/.tmp-step-000008-123"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (run / ".tmp-latest-123").write_text("step-0")
    train(options(resume=True, steps=8))
    assert not list(run.rglob(".tmp-*"))
    assert ".tmp-step-000008-123: removed" in caplog.text


def test_nothing_in_a_checkpoint_is_pickled(finished):
    folder = finished / "checkpoints/step-000006"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    assert load_file(folder / "rng.safetensors")["torch"].dtype == torch.uint8
