"""Checkpoints behind the training's back, signals in the middle of things, and losses that jump."""

import errno
import json
import os
import signal
import threading

import pytest

from gptopt.bench.resume import differences
from gptopt.errors import Interrupted, UserError
from gptopt.manifest import verify_manifest
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.pretraining import NextToken
from gptopt.training.session import Session
from gptopt.training.spikes import spiked
from gptopt.training.step import Stepper


@pytest.fixture
def before(monkeypatch):
    """`before(owner, name, do)`: call do(self, *arguments) first, whenever the method is called."""

    def patch(owner, name, do):
        original = getattr(owner, name)

        def patched(self, *given):
            do(self, *given)
            return original(self, *given)

        monkeypatch.setattr(owner, name, patched)
        return lambda: monkeypatch.setattr(owner, name, original)

    return patch


def test_training_goes_on_while_a_checkpoint_is_written(options, tmp_path, before):
    train(options("waits", sync_save=True, steps=4, keep_checkpoints=9))
    further, seen = threading.Event(), []

    def step(stepper, *given):
        if stepper.state.step == 3:
            further.set()

    def write(session, folder, snapshot):
        if snapshot.step == 2:
            seen.append(further.wait(timeout=20))

    before(Stepper, "step", step)
    before(Session, "write", write)
    train(options("goes on", steps=4, keep_checkpoints=9))
    assert seen == [True]
    # And it holds the moment it was taken at, though the weights have changed meanwhile.
    folders = [Checkpoints(tmp_path / run).of(2) for run in ("waits", "goes on")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        contents = [(folder / name).read_bytes() for folder in folders]
        assert contents[0] == contents[1], name
    assert not list(differences(tmp_path / "waits", tmp_path / "goes on"))


@pytest.mark.parametrize("sync", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_soon(options, tmp_path, before, sync):
    def full(session, folder, snapshot):
        if snapshot.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before(Session, "write", full)
    with pytest.raises(UserError, match=r"step-000004: cannot be written \(No space.*free space"):
        train(options(steps=10**6, sync_save=sync))
    run = tmp_path / "run"
    assert (run / "latest").read_text() == "step-000002\n"
    verify_manifest(run / "checkpoints/step-000002", "checkpoint")


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(options, tmp_path):
    train(options(steps=10, checkpoint_every=1, keep_checkpoints=2, keep_every=4, data={
        "kind": "char", "val_fraction": 0.0}))  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000004", "step-000008", "step-000009", "step-000010"]


def terminate(*given):
    os.kill(os.getpid(), signal.SIGTERM)


LONG = {"steps": 8, "accumulate": 3, "eval_every": 4, "checkpoint_every": 0, "exact": True}
LONG |= {"model": {"dropout": 0.2}, "sample_every": 4}


def test_a_signal_between_micro_batches_undoes_the_step_begun(options, tmp_path, before):
    train(options("straight", **LONG))

    def hit(stepper, *given):
        if stepper.state.step == 5:
            terminate()

    unharmed = before(Stepper, "_forward_backward", hit)
    with pytest.raises(Interrupted, match="SIGTERM, saved at step 5") as caught:
        train(options("broken", **LONG))
    assert caught.value.exit_code == 143
    unharmed()
    assert train(options("broken", resume=True, **LONG))["resumed_from"] == 5
    assert not list(differences(tmp_path / "straight", tmp_path / "broken"))


@pytest.mark.parametrize("method", ["evaluate", "sample"])
@pytest.mark.parametrize("save", [0, 4])
def test_a_signal_while_evaluating_leaves_the_rest_to_a_resume(
    options, tmp_path, before, method, save
):
    changes = LONG | {"checkpoint_every": save}
    train(options("straight", **changes))
    unharmed = before(NextToken, method, terminate)
    with pytest.raises(Interrupted, match="saved at step 4"):
        train(options("broken", **changes))
    unharmed()
    train(options("broken", resume=True, **changes))
    assert not list(differences(tmp_path / "straight", tmp_path / "broken"))
    samples = [sorted(p.name for p in (tmp_path / run / "samples").iterdir())
               for run in ("straight", "broken")]  # fmt: skip
    assert samples[0] == samples[1]


def test_a_loss_that_jumps_is_told_with_what_it_read(options, tmp_path, monkeypatch, caplog):
    original = Stepper._forward_backward

    def jump(self, *given):
        share = original(self, *given)
        return share * 3 if self.state.step + 1 in (20, 21) else share

    monkeypatch.setattr(Stepper, "_forward_backward", jump)
    train(options(steps=24))
    assert "step 20: the loss is " in caplog.text
    assert "step 21: the loss is " not in caplog.text  # the same jump
    (line,) = map(json.loads, (tmp_path / "run/spikes.jsonl").read_text().splitlines())
    assert line["step"] == 20
    assert line["loss"] > 2 * line["median"]
    assert [len(batch) for batch in line["offsets"]] == [3]


def test_noise_and_a_falling_loss_are_no_spikes():
    recent = []
    for step in range(300):
        loss = 4 * 0.99**step + 0.1 * (step % 7) / 7
        assert spiked(recent, loss) is None, step
    assert len(recent) == 64
    assert spiked(recent, 2.0) is not None
    assert spiked([1.0] * 5, 100.0) is None  # too few to compare with
