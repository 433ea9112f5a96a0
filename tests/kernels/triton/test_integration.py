"""Each operator as a program uses it: torch's own checks, compiled, under autocast, on views."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gptopt.kernels import launch, select

FP32, BF16 = torch.float32, torch.bfloat16
# One of each of attention's calls costs enough: the others run where time is plenty.
LONG = {"attention-1", "attention_backward-0"}


def registered_calls():
    """Every call that tests/kernels/test_operators.py makes of the registered operators."""
    path = Path(__file__).parents[1] / "test_operators.py"
    spec = importlib.util.spec_from_file_location("registered_calls", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.H, module.K = 2, 1  # smaller: it counts here who runs, not on what
    calls = module.every_call()
    return [
        pytest.param(*c.values, id=c.id, marks=[pytest.mark.slow] * (c.id in LONG)) for c in calls
    ]


@pytest.fixture
def launched(device, operators, monkeypatch) -> list[str]:
    """The names of the kernels that were launched, in their order."""
    for call in operators().values():
        assert select.runs_triton(call.operator, "triton", call.leaves[0])
    names, real = [], launch.launch

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        real(kernel, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("gptopt.kernels.") and getattr(module, "launch", None) is real:
            monkeypatch.setattr(module, "launch", spy)
    return names


@pytest.mark.parametrize(("name", "arguments"), registered_calls())
def test_opcheck_of_every_operator_and_its_backward(device, launched, name, arguments):
    def there(x):
        return x.detach().to(device).requires_grad_(x.requires_grad) if tensor(x) else x

    opcheck(getattr(torch.ops.gptopt, name).default, tuple(map(there, arguments)))
    asks_for_nothing = name == "layernorm_backward" and not any(arguments[-1])
    assert launched or asks_for_nothing


def tensor(x) -> bool:
    return isinstance(x, Tensor)


NAMES = ["attention", "attention with all", "layernorm", "ffn", "cross_entropy", "rotary"]


def gradients(function, leaves):
    results = function(*leaves)
    total = sum((x.float() * torch.arange(x.numel(), device=x.device).view(x.shape).cos()).sum()
                for x in results)  # fmt: skip
    return *results, *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        *((name, False) for name in NAMES if name != "attention with all"),
        *((name, True) for name in NAMES if name != "attention"),
        pytest.param("attention", True, marks=pytest.mark.slow),
        pytest.param("attention with all", False, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_with_the_same_results(device, operators, launched, name, autocast):
    torch._dynamo.reset()
    call = operators()[name]
    eager = call.function("triton")
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    results = []
    with torch.autocast(device.type, BF16, enabled=autocast):
        for function in (compiled, eager):
            launched.clear()
            results.append(gradients(function, call.leaves))
            assert launched
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_decode_compiles_whole_and_writes_in_place(device, operators, launched):
    torch._dynamo.reset()
    call, again = operators()["attention_decode"], operators()["attention_decode"]
    compiled = torch.compile(call.function("triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call.leaves), again.function("triton")(*again.leaves))
    assert "attention_decode_kernel" in launched
    assert call.cache[0].equal(again.cache[0])


@pytest.mark.parametrize("name", [*NAMES, "attention_decode"])
def test_under_autocast_the_results_have_the_dtypes_of_the_reference(device, operators, name):
    found, expected = [], []
    for impl, results in (("triton", found), ("reference", expected)):
        # A cache has the dtype that autocast gives the new keys: nobody casts it.
        call = operators(dtype=BF16 if name == "attention_decode" else FP32)[name]
        with torch.autocast(device.type, BF16):
            results += call.function(impl)(*call.leaves)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["attention", "ffn", "cross_entropy"])
def test_the_kernels_count_as_many_operations_as_the_reference(device, operators, launched, name):
    counts = []
    for export in (False, True):  # the reference counts as one operator only while exporting
        call = operators()[name]
        with FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch:
            if export:
                patch.setattr(select, "_find", lambda *_: "asleep")
                patch.setattr(torch.compiler, "is_exporting", lambda: True)
            gradients(call.function("reference" if export else "triton"), call.leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    current, seen = [0], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = {(1,): lambda *arguments, **options: seen.append(current[-1])}
    for index in (1, 0):
        x = SimpleNamespace(device=torch.device("cuda", index))
        launch.launch(kernel, (1,), x)
    assert seen == [1, 0]
    assert current == [0]
