"""--cuda-graph: what is refused, that a replay reads this step's inputs, and on a GPU the rest."""

import pytest
import torch
from safetensors.torch import load_file

from gptopt.errors import UserError
from gptopt.training import graph, train
from gptopt.training.graph import StepGraph, refuse_graph
from gptopt.training.metrics import read_metrics

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
RIGHT = {"ranks": 1, "accumulate": 1, "others": []}


@pytest.mark.parametrize(
    ("device", "dtype", "change", "message"),
    [
        (CPU, torch.float32, {}, "--device cpu, it records the step of a GPU"),
        (CUDA, torch.float16, {}, "--dtype float16"),
        (CUDA, torch.bfloat16, {"ranks": 2}, "several ranks"),
        (CUDA, torch.bfloat16, {"accumulate": 2}, "--accumulate"),
        (CUDA, torch.bfloat16, {"others": ["--compile", "--qat"]}, "--compile and --qat"),
    ],
)
def test_what_cannot_be_recorded_is_refused(device, dtype, change, message):
    with pytest.raises(UserError, match=f"--cuda-graph: does not go with .*{message}"):
        refuse_graph(device, dtype, **RIGHT | change)
    refuse_graph(CUDA, torch.bfloat16, **RIGHT)


def test_a_run_on_the_cpu_says_so_before_anything_is_built(options, tmp_path):
    with pytest.raises(UserError, match="--cuda-graph: does not go with --device cpu"):
        train(options(cuda_graph=True))
    assert not (tmp_path / "run/config.toml").exists()


@pytest.fixture
def recorder(monkeypatch):
    """A recording as far as a CPU has one: what is done again, and where its figures lie."""
    calls = {"apart": 0, "recorded": 0, "replayed": 0}

    def apart(work):
        calls["apart"] += 1
        return work()

    def record(work):
        calls["recorded"] += 1
        figures = torch.zeros(3)

        def replay():
            calls["replayed"] += 1
            figures.copy_(work())

        return replay, figures

    monkeypatch.setattr(graph, "_apart", apart)
    monkeypatch.setattr(graph, "_record", record)
    monkeypatch.setattr("gptopt.training.session.refuse_graph", lambda *args, **kwargs: None)
    return calls


@pytest.mark.parametrize("objective", ["next", "masked"])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_replayed_steps_read_their_own_inputs_seed_and_rate(
    options, tmp_path, recorder, optimiser, objective
):
    changes = {"optimiser": optimiser, "objective": objective, "model": {"dropout": 0.2}}
    changes |= {"steps": 9, "lr": 0.01}
    train(options("plain", **changes))
    train(options("replayed", **changes, cuda_graph=True))
    assert recorder == {"apart": 3, "recorded": 1, "replayed": 6}
    compare(tmp_path, 1e-5)


def compare(tmp_path, tolerance):
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("plain", "replayed")]
    for name in ("loss", "grad_norm", "lr", "tokens"):
        left, right = ([line[name] for line in each] for each in lines)
        assert len(left) == 9
        assert right == pytest.approx(left, rel=tolerance), name
    ends = [load_file(tmp_path / run / "checkpoints/step-000009/model.safetensors")
            for run in ("plain", "replayed")]  # fmt: skip
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=tolerance, atol=tolerance)


def test_another_shape_is_refused_by_name(recorder):
    steps = StepGraph(lambda inputs: inputs["ids"].float().sum().expand(3))
    assert steps.step({"ids": torch.ones(2, 4)}).tolist() == [8, 8, 8]
    with pytest.raises(UserError, match=r"ids has shape \(2, 5\), and the recorded step reads"):
        steps.step({"ids": torch.ones(2, 5)})


def test_figures_of_a_step_outlive_the_next(recorder):
    steps = StepGraph(lambda inputs: inputs["x"] * 2)
    found = [steps.step({"x": torch.full((3,), float(n))}) for n in range(6)]
    assert [each[0].item() for each in found] == [0, 2, 4, 6, 8, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_recorded_step_learns_what_a_plain_one_does(options, tmp_path, kernels, optimiser):
    changes = {"device": "cuda", "dtype": "float32", "kernels": kernels, "optimiser": optimiser}
    changes |= {"steps": 9, "lr": 0.01, "model": {"dropout": 0.2, "n_embd": 64}}
    train(options("plain", **changes))
    train(options("replayed", **changes, cuda_graph=True))
    compare(tmp_path, 1e-3)


@pytest.mark.gpu
def test_a_recorded_step_that_is_not_finite_changes_nothing(options, tmp_path):
    """Weights that are NaN make every loss so: all steps are skipped, recorded ones, too."""
    result = train(options(device="cuda", steps=9, lr=1e30, grad_clip=0.0, max_skips=9,
                           min_lr=0.0, warmup_steps=0, cuda_graph=True))  # fmt: skip
    saved = load_file(tmp_path / "run/checkpoints/step-000009/model.safetensors")
    assert result["skipped"] >= 1
    assert all(value.isfinite().all() for value in saved.values())
