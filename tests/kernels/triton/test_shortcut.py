"""The way past the dispatcher: taken by plain tensors alone, and nothing else about it shows."""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gptopt.kernels import cross_entropy, layernorm, library, rotary


class Wrapped(torch.Tensor):
    """A subclass that adds nothing."""


@pytest.fixture
def dispatched(device, monkeypatch) -> list[str]:
    """The operators that `library.call` hands to the dispatcher."""
    layernorm(torch.ones(2, 8, device=device), None, None, impl="triton")  # is loaded
    names, plain = [], library._plain

    def spy(arguments):
        found = plain(arguments)
        if not found:
            names.append(len(arguments))
        return found

    monkeypatch.setattr(library, "_plain", spy)
    return names


def norm(x, weight):
    return layernorm(x, weight, None, x, kind="rms", impl="triton")[0]


@pytest.fixture
def tensors(device):
    x = torch.randn(3, 8, device=device)
    return x, torch.nn.Parameter(torch.randn(8, device=device))


def test_plain_tensors_take_the_short_cut_forward_and_backward(tensors, dispatched):
    x, weight = tensors
    norm(x.requires_grad_(), weight).sum().backward()
    with torch.no_grad():
        norm(x, weight)
    with torch.inference_mode():
        norm(x, weight)
        norm(torch.ones_like(x), weight)
    assert not dispatched


def function_mode(call):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        call()


def dispatch_mode(call):
    with FlopCounterMode(display=False):
        call()


def profiler(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    assert any(event.key == "gptopt::layernorm" for event in seen.key_averages())


@pytest.mark.parametrize("watched", [function_mode, dispatch_mode, profiler])
def test_whoever_watches_sees_the_operators(tensors, dispatched, watched):
    x, weight = tensors
    watched(lambda: norm(x, weight))
    assert dispatched


def test_fake_tensors_never_reach_a_launcher(device, dispatched):
    with FakeTensorMode():
        x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
        assert norm(x, weight).shape == (3, 8)
        assert dispatched
    dispatched.clear()
    assert norm(x, weight).shape == (3, 8)  # nor outside of their mode
    assert dispatched


def test_subclasses_and_views_that_are_not_what_they_hold_take_the_dispatcher(tensors, dispatched):
    x, weight = tensors
    norm(x.as_subclass(Wrapped), weight)
    assert dispatched
    dispatched.clear()
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(norm(negative, weight), norm(-x, weight))
    assert dispatched


def test_transforms_take_the_dispatcher(tensors, dispatched):
    x, weight = tensors
    mapped = torch.func.vmap(norm, in_dims=(0, None))(x, weight.detach())
    assert dispatched
    torch.testing.assert_close(mapped, norm(x, weight))
    dispatched.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own decompositions
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(RuntimeError, match="jvp"),
                forward_ad.dual_level(),
            ):
                norm(forward_ad.make_dual(x, x), weight)
    assert dispatched


def test_compile_and_export_see_one_operator(tensors, dispatched, monkeypatch):
    x, weight = tensors
    expected = norm(x, weight)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), expected)
    compiled(x.requires_grad_(), weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(norm(x, weight).sum(), weight)[0])

    class Module(torch.nn.Module):
        def forward(self, x):
            return norm(x, None)

    program = torch.export.export(Module(), (x.detach(),))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.gptopt.layernorm.default in targets


def gradients(call, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.ones_like(result) * (i + 1) for i, result in enumerate(results)]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def calls(device):
    table = torch.rand(1, 5, 4, device=device)
    seed = torch.tensor(5, device=device)
    targets = torch.arange(6, device=device)
    return {
        "layernorm": (
            lambda x, w, r: layernorm(x, w, None, r, dropout_p=0.3, seed=seed, impl="triton"),
            [(3, 8), (8,), (3, 8)],
        ),
        "rotary": (
            lambda q, k: rotary(q, k, table, table, impl="triton"),
            [(2, 2, 5, 8), (2, 1, 5, 8)],
        ),
        "cross_entropy": (
            lambda x, w: cross_entropy(x, w, targets, impl="triton"),
            [(6, 8), (11, 8)],
        ),
    }


@pytest.mark.parametrize("name", ["layernorm", "rotary", "cross_entropy"])
def test_results_and_gradients_are_those_of_the_dispatcher_bit_for_bit(device, monkeypatch, name):
    call, shapes = calls(device)[name]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    short = gradients(call, inputs)
    monkeypatch.setattr(library, "_plain", lambda arguments: False)
    for a, b in zip(short, gradients(call, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("short", [True, False])
def test_an_evaluation_computes_no_gradients(device, monkeypatch, short):
    """Weights want gradients always; without grad mode the loss must not find any."""
    ran = []
    cross_entropy(torch.ones(1, 8, device=device), torch.ones(3, 8, device=device),
                  torch.zeros(1, dtype=torch.int64, device=device), impl="triton")  # fmt: skip
    body = library._BODIES["cross_entropy_forward"]
    monkeypatch.setitem(
        library._BODIES, "cross_entropy_forward", lambda *a: ran.append("gradients") or body(*a)
    )
    if not short:
        monkeypatch.setattr(library, "_plain", lambda arguments: False)
    weight = torch.nn.Parameter(torch.randn(11, 8, device=device))
    x, targets = torch.randn(6, 8, device=device), torch.arange(6, device=device)
    with torch.no_grad():
        plain = cross_entropy(x, weight, targets, impl="triton")
    assert not ran
    loss = cross_entropy(x, weight, targets, impl="triton")
    assert not plain.requires_grad
    assert loss.requires_grad
    torch.testing.assert_close(plain, loss)


def test_a_gradient_of_a_gradient_is_refused_here_too(tensors, dispatched):
    x, weight = tensors
    (dx,) = torch.autograd.grad(
        norm(x.requires_grad_(), weight).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    assert not dispatched
