"""Two ranks on the CPU: what they compute, what they save, and how they fail together."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank import results
from safetensors.torch import load_file

from gptopt.checkpoint import load_model
from gptopt.errors import CheckFailed, Interrupted, UserError
from gptopt.manifest import verify_manifest
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.distributed import Group, Launch, join_world, micro_batches, rank_device
from gptopt.training.metrics import read_metrics
from gptopt.training.pretraining import NextToken
from gptopt.training.sharded import ShardReader, load_sharded


def losses(run):
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


TWO = {"n_layer": 2, "n_embd": 16, "n_head": 2}
LONG = {"steps": 20, "eval_every": 10, "eval_batches": 0, "checkpoint_every": 10, "model": TWO}
BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


@BOTH
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_two_ranks_train_as_one_with_the_same_global_batch(
    options, tmp_path, ranks, parallel, kind, monkeypatch
):
    if kind == "float64":
        build = NextToken.build
        monkeypatch.setattr(NextToken, "build", lambda *given: build(*given).double())
    changes = {"float64": {}} if kind == "float64" else {}
    one = train(options("one", **LONG, batch_size=6, accumulate=2))
    chosen = options("two", **LONG, batch_size=3, accumulate=2, parallel=parallel)
    two, other = results(ranks.train(chosen, **changes))
    for key in ("tokens", "steps", "skipped", "parameters"):
        assert two[key] == one[key], key
    expected, found = (torch.tensor(losses(tmp_path / name)).double() for name in ("one", "two"))
    assert len(found) == 20
    if kind == "float64":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert other == two


def moments(folder):
    """Every moment of a checkpoint, whole."""
    reader = ShardReader(folder, "optimizer.safetensors")
    tensors = {name: torch.zeros(shape) for name, shape in reader.shapes.items()}
    load_sharded(reader, tensors, Group())
    return tensors


CLOCKS = {"seconds", "tokens_per_second", "mfu", "todo", "warm_end"}


def same_checkpoint(left, right):
    """Weights, moments, generators and counters of two checkpoints, bit for bit."""
    for name in ("model.safetensors", "rng.safetensors"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    a, b = moments(left), moments(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    states = [json.loads((folder / "state.json").read_text()) for folder in (left, right)]
    for key in ("random", "fixed"):
        assert states[0][key] == states[1][key], key
    trained = [state["train"] for state in states]
    for key in trained[0].keys() - CLOCKS:
        assert trained[0][key] == trained[1][key], key


@BOTH
def test_a_run_of_two_ranks_resumes_bit_for_bit(options, tmp_path, ranks, parallel):
    changes = {"steps": 8, "parallel": parallel, "accumulate": 2, "schedule": "constant"}
    changes |= {"model": TWO | {"dropout": 0.2}, "eval_every": 4, "checkpoint_every": 0}
    results(ranks.train(options("straight", **changes)))
    straight, broken = (tmp_path / run for run in ("straight", "broken"))
    results(ranks.train(options("broken", **changes | {"steps": 6})))
    shutil.rmtree(broken / "checkpoints/step-000006")  # the one before was saved as the best
    (again, _) = results(ranks.train(options("broken", resume=True, exact=True, **changes)))
    assert again["resumed_from"] == 4
    assert losses(straight) == losses(broken)
    same_checkpoint(straight / "checkpoints/step-000008", broken / "checkpoints/step-000008")


def test_dropout_differs_between_ranks(options, tmp_path, ranks):
    """Rows of two ranks that are alike are dropped out unlike, as two rows of one rank are."""
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    draws = [torch.randint(0, 2**63 - 1, (2,), generator=each)[rank]
             for rank, each in enumerate(generators)]  # fmt: skip
    assert draws[0] != draws[1]
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@BOTH
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_back(
    options, tmp_path, ranks, parallel, caplog
):
    changes = {"steps": 9, "eval_batches": 0, "checkpoint_every": 3, "keep_checkpoints": 9}
    changes |= {"model": TWO, "batch_size": 2, "schedule": "constant"}
    train(options("one", **changes | {"batch_size": 4}))
    run = tmp_path / "two"
    spread = changes | {"parallel": parallel}
    results(ranks.train(options("two", **spread | {"steps": 3})))
    saved = run / "checkpoints/step-000003"
    verify_manifest(saved, "checkpoint")
    sharded = sorted(path.name for path in saved.glob("optimizer*.safetensors"))
    assert len(sharded) == (2 if parallel == "fsdp" else 1)
    assert load_model(saved).model.config.n_layer == 2

    with pytest.raises(UserError, match="--exact: ranks was 2 and is 1 now"):
        train(options("two", resume=True, exact=True, **changes | {"steps": 6}))
    result = train(options("two", resume=True, **changes | {"steps": 6}))
    assert result["resumed_from"] == 3
    assert "resharded from 2 to 1 ranks: a step still reads 4 sequences, 2 at a time" in caplog.text
    # Two ranks take up what one has left in a plain file.
    (back, _) = results(ranks.train(options("two", resume=True, **spread)))
    assert (back["resumed_from"], back["steps"]) == (6, 9)
    found, expected = (torch.tensor(losses(tmp_path / name)) for name in ("two", "one"))
    assert len(found) == 9
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    positions = [json.loads((tmp_path / name / "checkpoints/step-000009/state.json").read_text())
                 ["train"]["sampler"] for name in ("two", "one")]  # fmt: skip
    assert positions[0] == positions[1]


def test_a_sharded_run_goes_on_unsharded(options, tmp_path, ranks):
    changes = {"steps": 6, "model": TWO, "schedule": "constant"}
    results(ranks.train(options("a", **changes | {"parallel": "fsdp"})))
    results(ranks.train(options("b", **changes | {"parallel": "fsdp", "steps": 4})))
    results(ranks.train(options("b", resume=True, **changes)))
    a, b = (load_file(tmp_path / run / "checkpoints/step-000006/model.safetensors")
            for run in "ab")  # fmt: skip
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6)


@BOTH
def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_all(options, tmp_path, ranks, parallel):
    chosen = options("run", parallel=parallel, max_skips=1, model=TWO)
    first, second = results(ranks.train(chosen, poisoned={"step": 3, "rank": 1}))
    assert first["skipped"] == second["skipped"] == 1
    assert losses(tmp_path / "run")[2] is None
    assert all(torch.isfinite(value).all() for value in moments(Path(first["checkpoint"])).values())
    chosen = options("stop", parallel=parallel, model=TWO)
    answers = ranks.train(chosen, poisoned={"step": 3, "rank": 1})
    (told,) = [answer for answer in answers if "error" in answer]
    (quiet,) = [answer for answer in answers if "error" not in answer]
    assert (told["code"], quiet["left"]) == (3, 3)
    assert "step 3 is not finite (loss nan" in told["error"]
    position = json.loads((tmp_path / "stop/diverged.json").read_text())
    assert [len(batch) for batch in position["offsets"]] == [6]  # of both ranks


@BOTH
def test_options_that_change_how_it_is_computed_change_no_result(
    options, tmp_path, ranks, parallel
):
    """Activation checkpointing, bfloat16 gathers, and saving without a thread."""
    plain = options("plain", parallel=parallel, model=TWO | {"dropout": 0.1})
    results(ranks.train(plain))
    options_ = {"activation_checkpointing": True, "sync_save": True}
    again = options("again", parallel=parallel, model=TWO | {"dropout": 0.1}, **options_)
    results(ranks.train(again))
    assert losses(tmp_path / "plain") == losses(tmp_path / "again")
    results(ranks.train(options("narrow", parallel=parallel, dtype="bfloat16", model=TWO)))
    train(options("alone", batch_size=6, dtype="bfloat16", model=TWO))
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "narrow")), torch.tensor(losses(tmp_path / "alone")),
        rtol=2e-3, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["nowhere.txt"]}, "nowhere.txt"),
        ({"model": {"block_size": 10**5}}, "training tokens are fewer"),
        ({"device": "mps"}, "--device mps: 2 ranks cannot share it"),
        ({"parallel": "fsdp", "sample_every": 2}, "--sample-every: under --parallel fsdp"),
    ],
)
def test_an_error_of_both_ranks_is_told_by_one(options, ranks, change, message):
    answers = ranks.train(options(**change))
    told = [answer["error"] for answer in answers if "error" in answer]
    assert len(told) == 1
    assert message in told[0]
    assert [answer["left"] for answer in answers if "left" in answer] == [2]


def test_a_full_disk_on_one_rank_leaves_the_checkpoint_before(options, tmp_path, ranks):
    changes = {"parallel": "fsdp", "steps": 6, "model": TWO}
    answers = ranks.train(options(**changes), full_disk={"step": 4, "rank": 1})
    (told,) = [answer["error"] for answer in answers if "error" in answer]
    assert "rank 1 cannot write its part" in told
    run = tmp_path / "run"
    assert (run / "latest").read_text() == "step-000002\n"
    verify_manifest(run / "checkpoints/step-000002", "checkpoint")
    assert not list((run / "checkpoints").glob(".tmp-*"))
    (result, _) = results(ranks.train(options(resume=True, **changes)))
    assert result["resumed_from"] == 2


# --- without processes ----------------------------------------------------------------------------


def test_ranks_without_torchrun_are_refused(options):
    with pytest.raises(UserError, match=r"--parallel fsdp needs several processes.*torchrun"):
        train(options(parallel="fsdp"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("saved_by_a_signal", [False, True])
def test_no_thread_of_a_group_outlives_the_run(options, monkeypatch, saved_by_a_signal):
    """One that lets go of a tensor while Python ends would abort the process."""

    def threads():
        names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
        return sum("gloo" in name for name in names)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}  # fmt: skip
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    before = threads()
    with contextlib.suppress(Interrupted), join_world(options(parallel="fsdp")) as world:
        assert world.control.all("said") == ["said"]
        assert threads() > before
        if saved_by_a_signal:
            raise Interrupted("saved", 143)
    assert threads() == before


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    launch = Launch(rank=0, size=2, local_rank=0, local_size=2)
    with pytest.raises(UserError, match="2 ranks on this machine, but torch sees 1 CUDA devices"):
        rank_device("auto", launch)
    assert rank_device("cuda", Launch(3, 4, 0, 1)) == "cuda:0"


def test_half_of_what_torchrun_says_is_an_error(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2, but not all of RANK.*start with torchrun"):
        train(options())


@pytest.mark.parametrize(
    ("sequences", "batch_size", "world", "count"),
    [(6, 6, 1, 1), (6, 3, 2, 1), (6, 3, 1, 2), (12, 2, 3, 2), (6, 3, 4, 1), (7, 1, 2, 1)],
)
def test_a_step_is_cut_into_as_few_micro_batches_as_fit(sequences, batch_size, world, count):
    assert micro_batches(sequences, batch_size, world) == count


def test_more_ranks_than_sequences_are_refused():
    with pytest.raises(UserError, match="6 sequences a step, which 8 ranks cannot share"):
        micro_batches(6, 3, 8)


def test_an_index_that_does_not_cover_its_tensors_is_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [4], "parts": [
        {"offsets": [0], "sizes": [2], "file": "x.safetensors", "key": "w"}]}  # fmt: skip
    for change in ({}, {"shape": [2], "parts": [entry["parts"][0] | {"file": "../x"}]}):
        index = {"format": 1, "tensors": {"w": entry | change}}
        (tmp_path / "optimizer.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckFailed, match="not an index this version can read"):
            ShardReader(tmp_path, "optimizer.safetensors")


# --- under torchrun -------------------------------------------------------------------------------


def kill_group(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def torchrun(flags, tmp_path):
    """Start `torchrun --no-python gptopt train ...` with two ranks; killed at the end."""
    with contextlib.ExitStack() as stack:

        def start(before=(), **changes):
            scripts = Path(sys.executable).parent
            process = subprocess.Popen(
                [
                    scripts / "torchrun", "--no-python", "--nproc-per-node", "2",
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
                    *before, scripts / "gptopt", "train", *flags(**changes), "--json",
                ],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(
                lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
            )
            return process

        yield start


# Leaves each rank's exit code in a file: torchrun tells its own alone.
TELLING = ["sh", "-c", 'trap : TERM; "$@"; echo $? > code-$RANK', "sh"]


def workers(launcher):
    """The launcher's children, rank 0 first."""
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, listed):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        variables = dict(item.partition("=")[::2] for item in environment)
        if "RANK" in variables:
            ranks[int(variables["RANK"])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for_step(run, process, seconds=90.0):
    deadline = time.monotonic() + seconds
    path = run / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sigterm_ends_every_rank_saved_within_30_seconds(options, tmp_path, torchrun, ranks):
    forever = {"steps": 10**6, "checkpoint_every": 0, "parallel": "fsdp", "model": TWO}
    process = torchrun(before=TELLING, **forever)
    wait_for_step(tmp_path / "run", process)
    began = time.monotonic()
    process.terminate()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["143\n"] * 2
    assert errors.count("SIGTERM, saved at step") == 1
    assert "continue with the same command and --resume" in errors
    assert out == ""
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    verify_manifest(saved, "checkpoint")
    step = int(saved.name.removeprefix("step-"))
    (result, _) = results(ranks.train(options(resume=True, **forever | {"steps": step + 2})))
    assert (result["resumed_from"], result["steps"]) == (step, step + 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_that_dies_ends_the_job_with_its_reason(options, tmp_path, torchrun):
    process = torchrun(steps=10**6, checkpoint_every=5, model=TWO)
    run = tmp_path / "run"
    wait_for_step(run, process)
    while not (run / "latest").exists():
        time.sleep(0.02)
    _, victim = workers(process)
    os.kill(victim, signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out == ""
    assert "another rank ended" in errors  # by the one that lives
    assert "Signal 9 (SIGKILL)" in errors  # by torchrun, of the one that died
    newest = Checkpoints(run).newest()
    assert newest is not None
    assert train(options(resume=True, steps=10**6, max_seconds=1.0, model=TWO))["steps"] > 5
