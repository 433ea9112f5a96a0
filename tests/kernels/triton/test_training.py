"""A whole GPT in Triton: the real training step follows the reference's losses, step for step."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptopt.config import ModelConfig, TrainOptions
from gptopt.kernels import launch
from gptopt.model import GPT
from gptopt.training.pretraining import NextToken
from gptopt.training.session import open_session
from gptopt.training.step import Stepper

STEPS = 20
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 14}
MODELS = {
    "llama": {
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "n_kv_head": 1,
        "n_inner": 24,
        "tie_head": False,
        "window": 7,
    },
    "gpt2": {"n_layer": 1, "n_inner": 24},
    "dropout": {"dropout": 0.2, "norm_position": "sandwich", "n_layer": 1, "n_inner": 24},
}
OPERATORS = ("attention", "layernorm", "ffn", "cross_entropy")


@pytest.fixture
def launched(device, monkeypatch) -> set[str]:
    """The names of the kernels that were launched."""
    GPT(ModelConfig(**TINY, vocab_size=8, position="rotary"), kernels="triton").to(device)(
        torch.zeros(1, 2, dtype=torch.int64, device=device),
        torch.zeros(1, 2, dtype=torch.int64, device=device),
    )  # every operator's kernels are loaded
    names, real = set(), launch.launch

    def spy(kernel, *arguments, **options):
        names.add(kernel.__name__)
        real(kernel, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("gptopt.kernels.") and getattr(module, "launch", None) is real:
            monkeypatch.setattr(module, "launch", spy)
    return names


@pytest.fixture
def train(tmp_path, device):
    """train(kernels, model): the losses of 20 steps, and the model they left behind."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}. " for n in range(150)))

    def run(kernels: str, model: dict) -> SimpleNamespace:
        options = TrainOptions.model_validate(
            {
                "inputs": [str(text)], "out": str(tmp_path / kernels), "kernels": kernels,
                "device": str(device), "dtype": "float32", "batch_size": 1, "steps": STEPS,
                "lr": 1e-2, "warmup_steps": 2, "z_loss": 1e-3, "label_smoothing": 0.05,
                "seed": 3, "json": True, "data": {"kind": "char"}, "model": TINY | model,
            }
        )  # fmt: skip
        session = open_session(NextToken(options), tmp_path / kernels, None)
        stepper, losses = Stepper(session), []
        for _ in range(STEPS):
            stepper.step(0.0)
            before = session.state.loss_sum
            stepper.settle()
            losses.append(session.state.loss_sum - before)
        assert session.state.loss_count == STEPS, "a step was not finite"
        return SimpleNamespace(losses=losses, model=session.model)

    return run


@pytest.mark.parametrize("name", MODELS)
def test_training_follows_the_reference_loss_at_each_step(train, launched, name):
    expected = train("reference", MODELS[name])
    assert not launched
    found = train("triton", MODELS[name])
    for operator in OPERATORS:
        for kernel in ("fwd", "bwd"):
            assert any(n.startswith(f"{operator}_{kernel}") for n in launched), launched
    assert ("rotary_kernel" in launched) == (name == "llama")
    assert expected.losses[-1] < expected.losses[0] - 0.5, "nothing was learned"
    gaps = [abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)]
    assert max(gaps) < 1e-3, gaps


class _Sums(TorchDispatchMode):
    """Counts the sums of two tensors of one shape, and each operator's calls."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.sums, self.calls = shape, 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.add.Tensor:
            self.sums += all(getattr(x, "shape", None) == self.shape for x in arguments)
        if function is torch.ops.gptopt.layernorm.default:
            self.calls.append(arguments[3] is not None)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("norm_position", "residuals"),
    [
        ("pre", [False, *[True] * 6]),
        ("sandwich", [False, False, True, False, *[True, False] * 4, True]),
        ("post", [True] * 6),
    ],
)
def test_the_residual_stream_is_summed_inside_the_norms_across_blocks(
    device, norm_position, residuals
):
    config = ModelConfig(
        **TINY | {"n_layer": 3}, vocab_size=8, position="rotary", norm_position=norm_position
    )
    model = GPT(config, kernels="triton").to(device)
    ids = torch.arange(10, device=device).view(2, 5) % 8
    with torch.no_grad(), _Sums(torch.Size((2, 5, 16))) as seen:
        model(ids, ids)
    assert seen.calls == residuals
    assert seen.sums == 0
