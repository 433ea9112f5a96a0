"""--dry-run: its figures beside those of the run itself; nothing is written."""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from gptopt.config import LoraOptions, ModelConfig, TrainOptions
from gptopt.config_classifier import ClassifierConfig
from gptopt.errors import UserError
from gptopt.lora import apply_lora
from gptopt.model import GPT, Classifier
from gptopt.training import estimate, train
from gptopt.training.hardware import flops_per_token
from gptopt.training.memory import Meter
from gptopt.training.session import Session
from gptopt.training.step import Stepper

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 16}


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch, request):
    if "in_full" not in request.fixturenames:
        monkeypatch.setattr(estimate, "matmul_peak", lambda device, dtype: 1e12)


def dry(options, **changes):
    return train(options("nowhere", dry_run=True, **{"model": SHAPE} | changes))


def files(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


@pytest.fixture
def base(options):
    return train(options("base", steps=1, model=SHAPE))["checkpoint"]


KINDS = {
    "plain": {"accumulate": 2},
    "checkpointed": {"activation_checkpointing": True},
    "narrow": {"dtype": "bfloat16", "model": SHAPE | {"dropout": 0.1}},
    "muon": {"optimiser": "muon", "model": SHAPE | {"position": "rotary", "activation": "swiglu",
                                                    "norm": "rmsnorm", "bias": False,
                                                    "tie_head": False}},
    "adapter": {"init_from": "base", "lora": {"rank": 2, "targets": "attention,ffn"}},
    "kept weights": {"init_from": "base", "qat": "q4"},
    "taught": {"distill": {"teacher": "base"}},
}  # fmt: skip


def changes_of(kind, request):
    """Of the options; `base` is the folder of a trained model."""

    def put(value):
        if isinstance(value, dict):
            return {name: put(each) for name, each in value.items()}
        return request.getfixturevalue("base") if value == "base" else value

    return {"model": SHAPE} | put(KINDS[kind])


@pytest.fixture
def watched(monkeypatch):
    """What autograd saves of every micro-batch, and what the allocator says of every step."""
    saved, peaks = [], []
    precision, step = Session.precision, Stepper.step

    def watched_forward(self):
        held, kept = contextlib.ExitStack(), {}
        own = {p.untyped_storage()._cdata for p in self.model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        held.callback(lambda: saved.append(sum(kept.values())))
        held.enter_context(precision(self))
        held.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each))
        return held

    def watched_step(self, *given):
        teacher = self.session.objective.teacher
        before = [*self.session.model.parameters(), *(teacher.parameters() if teacher else ())]
        before += [each for state in self.session.optimiser.state.values()
                   for each in state.values()]  # fmt: skip
        now = peak = sum(each.nbytes for each in before)
        with torch.profiler.profile(profile_memory=True) as profile:
            step(self, *given)
        events = profile.profiler.kineto_results.events()
        for event in sorted(events, key=lambda each: each.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)

    monkeypatch.setattr(Session, "precision", watched_forward)
    monkeypatch.setattr(Stepper, "step", watched_step)
    return saved, peaks


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_run_then_takes(options, request, watched, kind):
    """Weights, moments and checkpoint to the byte; what a step holds within 2 %."""
    changes = changes_of(kind, request)
    found = dry(options, **changes)
    saved, peaks = watched
    saved.clear(), peaks.clear()
    result = train(options(**changes, steps=2, eval_batches=0))

    assert result["parameters"] == found["parameters"]["total"]
    folder, tensors = Path(result["checkpoint"]), {}
    for path in (*folder.glob("*model.safetensors"), folder / "optimizer.safetensors"):
        tensors |= load_file(path)
    sizes = {name: value.nbytes for name, value in tensors.items()}
    grids = sum(size for name, size in sizes.items() if name.startswith("grid."))
    assert found["checkpoint_bytes"] == sum(sizes.values()) - grids
    moments = ("step.", "exp_avg.", "exp_avg_sq.", "momentum.")
    assert found["optimiser_bytes"] == sum(
        size for name, size in sizes.items() if name.startswith(moments)
    )
    assert found["weights_bytes"] == 4 * found["parameters"]["total"]
    assert found["gradients_bytes"] == 4 * found["parameters"]["trained"]
    assert (found["teacher_bytes"] > 0) == (kind == "taught")
    assert (found["masters_bytes"] > 0) == (kind == "kept weights")

    ending = "_checkpointed" if kind == "checkpointed" else ""
    assert found["peak_bytes" + ending] == pytest.approx(max(peaks), rel=0.02)
    assert found["activations_bytes_checkpointed"] < 0.6 * found["activations_bytes"]
    if not ending:  # there autograd saves nothing: a block's input is an argument
        assert found["activations_bytes"] == pytest.approx(max(saved), rel=0.01)


def test_nothing_is_written(options, tmp_path, corpus):
    before = files(tmp_path)
    found = dry(options)
    assert files(tmp_path) == before
    assert found["steps"] == 6
    assert found["tokens_per_step"] == 3 * 16


def test_what_is_printed_has_every_part(options, capsys):
    dumped = options("x", dry_run=True, model=SHAPE).model_dump()
    train(TrainOptions.model_validate(dumped | {"json_output": False}, by_name=True))
    said = capsys.readouterr().out
    for name in ("parameters", "activations", "peak", "speed", "time", "checkpoint"):
        assert f"\n{name} " in f"\n{said}", name
    assert "with --activation-checkpointing" in said


def test_a_model_that_does_not_fit_is_estimated_all_the_same(options, monkeypatch):
    """A 7B-sized one, of which this machine holds nothing."""
    shape = {"n_layer": 8, "n_embd": 8192, "n_head": 64, "block_size": 64, "bias": False}
    monkeypatch.setattr(estimate, "total_memory_bytes", lambda device: 2**34)
    found = dry(options, model=shape, optimiser="muon")
    assert found["fits"] is False
    assert found["parameters"]["total"] > 6e9
    assert found["peak_bytes"] > 12 * found["parameters"]["total"]


def test_speed_and_time_follow_from_the_peak(options, in_full):
    found = dry(options)
    rate = found["matmul_peak_flops"] / found["flops_per_token"]
    assert found["tokens_per_second_at_most"] == pytest.approx(rate)
    assert found["seconds_at_least"] == pytest.approx(6 * 48 / rate)
    assert dry(options, max_seconds=1e-9)["seconds_at_least"] == 1e-9


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter", "labels"])
def test_operations_are_those_that_torch_counts(kind):
    """Of one token, where attention is next to nothing; the first layer's input has no gradient."""
    shape = {"n_layer": 6, "n_head": 2, "n_embd": 32, "block_size": 1, "vocab_size": 64}
    shape["tie_head"] = kind != "untied"
    if kind == "labels":
        model = Classifier(ClassifierConfig(**shape, labels=["a", "b"]), kernels="reference")
    else:
        model = GPT(ModelConfig(**shape), kernels="reference")
    if kind == "adapter":
        apply_lora(model, LoraOptions(rank=4, targets="attention,ffn"))
    with FlopCounterMode(display=False) as counter:
        out = model(torch.tensor([[3]]), torch.tensor([0] if kind == "labels" else [[3]]))
        out.loss.backward()
    assert flops_per_token(model, 1) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_run_that_exists_or_is_shared_is_not_estimated(options, monkeypatch):
    with pytest.raises(UserError, match="--dry-run: estimates a run of one process"):
        dry(options, resume=True)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="leave --resume and torchrun out"):
        dry(options)


def test_the_meter_forgets_what_is_gone():
    with Meter() as meter:
        kept = torch.ones(100)
        kept[10:].add_(1)
        assert meter.held == 400
        torch.ones(50) * 2
    assert (meter.held, meter.peak) == (400, 800)
