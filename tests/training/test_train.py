"""A whole run in this process: what it learns, what it writes, what it refuses."""

import json
import math

import numpy as np
import pytest
import torch

from gptopt.checkpoint import load_model, resolve_model
from gptopt.data import open_dataset
from gptopt.errors import Diverged, UserError
from gptopt.evaluate import evaluate_split
from gptopt.manifest import verify_manifest
from gptopt.training import train
from gptopt.training.metrics import read_metrics
from gptopt.training.pretraining import NextToken
from gptopt.training.session import open_session
from gptopt.training.step import Stepper


@pytest.fixture
def metrics(tmp_path):
    return lambda out="run": read_metrics(tmp_path / out / "metrics.jsonl")


def test_loss_falls_far_below_that_of_letters_at_random(options, metrics):
    chosen = options(
        steps=90, batch_size=16, lr=1e-2, log_every=15, eval_every=30, checkpoint_every=0,
        eval_batches=0, model={"n_layer": 2, "n_embd": 32, "block_size": 32},
    )  # fmt: skip
    result = train(chosen)
    lines = metrics()
    uniform = math.log(load_model(result["checkpoint"]).tokenizer.size)
    assert lines[0]["loss"] > 0.6 * uniform
    assert result["train_loss"] < 0.5 * uniform
    assert result["val_loss"] < 0.5 * uniform
    assert [line["step"] for line in lines if "val_loss" in line] == [30, 60, 90]
    assert result["best_val_loss"] == min(line["val_loss"] for line in lines if "val_loss" in line)


def test_the_reported_validation_loss_is_the_checkpoints_own(options):
    result = train(options(eval_batches=0))
    loaded = load_model(result["checkpoint"])
    dataset = open_dataset([f"{result['out']}/data"], options().data)
    loss, tokens = evaluate_split(loaded.model, dataset.val, block_size=8, batch_size=3)
    assert tokens == len(dataset.val) - 1
    assert loss == pytest.approx(result["val_loss"], abs=1e-6)


def test_a_run_folder_holds_what_its_readers_need(options, tmp_path, metrics, caplog, in_full):
    caplog.set_level("INFO", "gptopt")
    result = train(options(eval_every=3, sample_every=4))
    run = tmp_path / "run"
    for name in ("config.toml", "env.json", "log.txt", "loss.png", "result.json", "data"):
        assert (run / name).exists(), name
    assert json.loads((run / "result.json").read_text()) == result
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-000004.txt", "step-000006.txt",
    ]  # fmt: skip
    assert "step 3: train loss" in (run / "log.txt").read_text()
    assert result["loss_curve"] == str(run / "loss.png")
    last = metrics()[-1]
    assert last["tokens"] == 6 * 3 * 8
    assert last["eta_seconds"] == 0
    assert 0 < last["mfu"] < 1
    assert last["memory_bytes"] > 10**7
    assert last["tokens_per_second"] == pytest.approx(1000 * 3 * 8 / last["step_ms"])
    environment = json.loads((run / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["matmul_peak_flops"] > 1e8


def test_without_json_the_result_is_told_on_stdout(options, capsys):
    result = train(options(json=False))
    told = capsys.readouterr().out
    assert f"validation loss  {result['val_loss']:.4f}" in told
    assert result["checkpoint"] in told


def test_every_step_has_one_line_and_evaluations_are_on_it(options, metrics):
    train(options(steps=7, log_every=2, eval_every=3, checkpoint_every=0))
    assert [(line["step"], "val_loss" in line) for line in metrics()] == [
        (2, False), (3, True), (4, False), (6, True), (7, True),
    ]  # fmt: skip


def test_accumulation_equals_one_bigger_batch(options, tmp_path):
    """In float64, where only the order of sums differs."""
    weights = []
    for name, batch, accumulate in (("one", 6, 1), ("two", 3, 2), ("six", 1, 6)):
        session = open_session(
            NextToken(options(name, batch_size=batch, accumulate=accumulate)), tmp_path / name, None
        )
        session.model.double()
        stepper = Stepper(session)
        for _ in range(3):
            stepper.step(0.0)
        stepper.settle()
        weights.append(torch.cat([p.detach().flatten() for p in session.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-9, atol=1e-12)


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_batch(options, tmp_path):
    """The fused, foreach step against the same update written down plainly."""
    chosen = options(grad_clip=0.05, lr=1e-2, warmup_steps=0, weight_decay=0.3)
    session = open_session(NextToken(chosen), tmp_path / "run", None)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    state = session.batches.state_dict()
    batch = session.batches.next()
    session.model(**{k: torch.from_numpy(v) for k, v in batch.inputs.items()}).loss.backward()
    gradients = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    session.model.zero_grad()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert norm > 0.05

    session.batches.load_state_dict(state)
    stepper = Stepper(session)
    stepper.step(0.0)
    stepper.settle()
    assert stepper.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in session.model.named_parameters():
        decay = 0.3 if parameter.ndim >= 2 else 0.0
        gradient = gradients[name] * (0.05 / norm)
        # The first AdamW step: both bias-corrected moments are the gradient's own powers.
        update = gradient / (gradient.abs() + 1e-8)
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=2e-6)


def test_dropout_changes_the_run_and_the_seed_decides_how(options):
    plain = train(options("a", steps=3))["train_loss"]
    dropped = train(options("b", steps=3, model={"dropout": 0.3}))["train_loss"]
    again = train(options("c", steps=3, model={"dropout": 0.3}))["train_loss"]
    other = train(options("d", steps=3, model={"dropout": 0.3}, seed=6))["train_loss"]
    assert dropped == again
    assert len({plain, dropped, other}) == 3


def test_bfloat16_autocast_stays_near_float32_and_keeps_float32_weights(options):
    exact = train(options("a"))
    rough = train(options("b", dtype="bfloat16"))
    assert rough["dtype"] == "bfloat16"
    assert rough["train_loss"] != exact["train_loss"]
    assert rough["train_loss"] == pytest.approx(exact["train_loss"], rel=2e-2)
    loaded = load_model(rough["checkpoint"])
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_float16_scales_its_loss_and_saves_the_scale(options, tmp_path):
    result = train(options(dtype="float16"))
    assert result["skipped"] == 0
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())
    assert state["train"]["scaler"]["scale"] >= 1


def test_max_seconds_ends_the_run_in_time_with_the_rate_at_its_minimum(options, metrics):
    result = train(options(steps=10**6, max_seconds=1.5, warmup_steps=3, checkpoint_every=0))
    assert result["stopped_by"] == "time"
    assert 1.2 < result["seconds"] < 3
    assert metrics()[-1]["lr"] == pytest.approx(1e-4, rel=0.2)
    assert max(line["lr"] for line in metrics()) == pytest.approx(1e-3, rel=1e-2)


def test_only_best_latest_and_the_newest_checkpoints_are_kept(options, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.7, 2.6])
    monkeypatch.setattr(
        "gptopt.training.loop.evaluate", lambda *arguments: {"val_loss": next(losses)}
    )
    result = train(options(checkpoint_every=1, eval_every=1, keep_checkpoints=2))
    run = tmp_path / "run"
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert found == ["step-000002", "step-000005", "step-000006"]
    assert result["best_step"] == 2
    assert (run / "best").read_text() == "step-000002\n"
    assert (run / "latest").read_text() == "step-000006\n"
    assert resolve_model(run).name == "step-000002"
    assert resolve_model(run, "best").name == "step-000002"
    assert resolve_model(run, "last").name == "step-000006"
    for name in found:
        verify_manifest(run / "checkpoints" / name, "checkpoint")


def test_without_validation_text_the_run_stands_for_its_last_checkpoint(options, tmp_path):
    result = train(options(data={"kind": "char", "val_fraction": 0.0}, eval_every=2))
    assert result["val_loss"] is None
    assert result["best_checkpoint"] is None
    assert resolve_model(tmp_path / "run").name == "step-000006"


def test_checkpoint_every_0_saves_the_best_evaluations_and_the_end(options, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(
        "gptopt.training.loop.evaluate", lambda *arguments: {"val_loss": next(losses)}
    )
    train(options(steps=8, checkpoint_every=0, eval_every=2))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000008"]


def test_mfu_is_null_where_no_peak_was_measured(options, metrics):
    assert train(options(steps=1))["mfu"] is None
    assert metrics()[0]["mfu"] is None


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """Makes the gradient of chosen steps (counted from 1) infinite or NaN."""

    def at(*steps, value=float("nan")):
        original = Stepper._forward_backward

        def poisoned(self, *arguments):
            loss = original(self, *arguments)
            if self.state.step + 1 in steps:
                next(iter(self.session.model.parameters())).grad[0, 0] = value
            return loss

        monkeypatch.setattr(Stepper, "_forward_backward", poisoned)

    return at


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    options, tmp_path, poison, value
):
    poison(5, value=value)
    with pytest.raises(Diverged, match=r"step 5 is not finite .*step-000004 is kept") as caught:
        train(options())
    assert caught.value.exit_code == 3
    run = tmp_path / "run"
    verify_manifest(run / "checkpoints/step-000004", "checkpoint")
    assert (run / "latest").read_text() == "step-000004\n"
    told = json.loads((run / "diverged.json").read_text())
    assert told["step"] == 5
    assert np.shape(told["offsets"]) == (1, 3)
    assert not (run / "result.json").exists()


def test_a_skipped_step_changes_neither_weights_nor_moments(options, tmp_path, poison, metrics):
    poison(3)
    session = open_session(NextToken(options(max_skips=1)), tmp_path / "other", None)
    stepper = Stepper(session)
    for _ in range(2):
        stepper.step(0.0)
    before = [p.detach().clone() for p in session.model.parameters()]
    moments = [s["exp_avg"].clone() for s in session.optimiser.state.values()]
    stepper.step(0.0)
    stepper.settle()
    assert session.state.skipped == 1
    assert all(map(torch.equal, before, session.model.parameters()))
    after = [s["exp_avg"] for s in session.optimiser.state.values()]
    assert all(map(torch.equal, moments, after))
    assert {float(s["step"]) for s in session.optimiser.state.values()} == {2.0}


def test_skips_are_counted_over_the_run_and_limited(options, poison, metrics):
    poison(2, 4)
    assert train(options("two", max_skips=2))["skipped"] == 2
    lines = metrics("two")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert lines[1]["loss"] is None  # the only step of that line was skipped
    with pytest.raises(Diverged, match="step 4"):
        train(options("one", max_skips=1))


def test_reads_put_off_as_on_a_gpu_find_the_same(options, tmp_path, poison, metrics, monkeypatch):
    """On a GPU losses are read when a line is due: a bad step is skipped before it is known."""
    poison(2)
    original = Stepper.__init__

    def late(self, session):
        original(self, session)
        self.reads_are_free = False

    monkeypatch.setattr(Stepper, "__init__", late)
    train(options("late", max_skips=1, log_every=3, checkpoint_every=0))
    monkeypatch.setattr(Stepper, "__init__", original)
    train(options("now", max_skips=1, log_every=3, checkpoint_every=0))
    assert [line["loss"] for line in metrics("late")] == [line["loss"] for line in metrics("now")]
    with pytest.raises(Diverged, match=r"step 2 .*no checkpoint"):
        train(options("stop", log_every=3, checkpoint_every=0))


# --- what a user can get wrong --------------------------------------------------------------------


def test_a_corpus_shorter_than_one_block_is_one_clear_line(options, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short for that")
    with pytest.raises(UserError, match=r"short\.txt: \d+ training tokens are fewer than the 65"):
        train(options(inputs=[str(short)], model={"block_size": 64}))


def test_a_vocabulary_below_the_tokenizers_is_refused(options):
    with pytest.raises(UserError, match=r"--model\.vocab-size 5: the tokenizer has \d+ ids"):
        train(options(model={"vocab_size": 5}))


def test_the_vocabulary_is_padded_to_64_unless_given(options):
    padded = load_model(train(options("a", steps=1))["checkpoint"])
    assert padded.model.config.vocab_size == 64
    exact = train(options("b", steps=1, model={"vocab_size": padded.tokenizer.size}))
    assert load_model(exact["checkpoint"]).model.config.vocab_size == padded.tokenizer.size


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(options):
    with pytest.raises(UserError, match="GiB; choose a smaller model"):
        train(options(model={"n_embd": 2**20, "n_layer": 4096}))


@pytest.mark.parametrize("device", ["cuda:63", "tpu", "meta"])
def test_a_device_that_is_not_there_is_refused(options, device):
    with pytest.raises(UserError, match=f"--device {device}: "):
        train(options(device=device))


def test_a_bidirectional_model_is_refused(options):
    with pytest.raises(UserError, match="causal"):
        train(options(model={"causal": False}))


def test_a_missing_corpus_leaves_room_for_the_next_try(options, corpus, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(options(inputs=[str(tmp_path / "nowhere.txt")]))
    with pytest.raises(UserError, match="block"):
        train(options(model={"block_size": 10**5}))
    # The next try tokenises otherwise, and is not held to the first one's text.
    assert train(options(steps=1, data={"kind": "bpe", "vocab_size": 300}))["steps"] == 1


def test_compile_without_a_compiler_names_the_next_step(options, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler.*drop --compile"):
        train(options(compile=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of torch's own code
def test_compiled_training_agrees_with_eager(options):
    eager = train(options("eager"))
    compiled = train(options("compiled", compile=True))
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)
