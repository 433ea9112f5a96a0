"""What the operators refuse, in one line that says what and why; and what `auto` does instead."""

import importlib.util
import logging

import pytest
import torch
import triton

from gptopt.kernels import (
    KernelUnavailable,
    attention,
    attention_decode,
    cross_entropy,
    ffn,
    launch,
    layernorm,
    rotary,
    select,
)

B, H, K, T, D, C, F, V, M = 2, 4, 2, 3, 16, 8, 10, 12, 9


@pytest.fixture
def good(device):
    """Arguments of every operator that nothing is wrong with: (function, positional, named)."""

    def random(*shape):
        return torch.randn(shape, device=device)

    seed = torch.tensor(5, device=device)
    q, k = random(B, H, T, D), random(B, K, T, D)
    named = {
        "past": (random(B, K, 2, D), random(B, K, 2, D)),
        "key_mask": torch.ones(B, T + 2, dtype=torch.bool, device=device),
        "doc_ids": torch.zeros(B, T + 2, dtype=torch.int64, device=device),
        "alibi_slopes": random(H),
        "dropout_p": 0.1,
        "seed": seed,
    }
    cache = {"cache": (random(B, K, M, D), random(B, K, M, D))}
    cache["lengths"] = torch.tensor([0, 2], device=device)
    table, targets = random(1, T, D // 2), torch.zeros(T, dtype=torch.int64, device=device)
    norm = {"x": random(T, C), "weight": random(C), "bias": random(C), "residual": random(T, C)}
    return {
        "attention": (attention, {"q": q, "k": k, "v": k, **named}),
        "attention_decode": (attention_decode, {"q": q, "k": k, "v": k, **cache}),
        "layernorm": (layernorm, {**norm, "dropout_p": 0.1, "seed": seed}),
        "ffn": (
            ffn,
            {
                "x": random(T, C),
                "weight": random(F, C),
                "bias": random(F),
                "gate_weight": random(F, C),
                "addend": random(T, F),
                "activation": "swiglu",
            },
        ),
        "cross_entropy": (
            cross_entropy,
            {"hidden": random(T, C), "head_weight": random(V, C), "targets": targets},
        ),
        "rotary": (rotary, {"q": q, "k": k, "cos": table, "sin": table}),
    }


def half(x):
    return x.half()


def whole(x):
    return x.int()


def elsewhere(x):
    return x.to("meta")


def longer(x):
    return torch.cat((x, x), -1)


def flat(x):
    return x.reshape(-1)


def both(function):
    return lambda pair: tuple(map(function, pair))


# Operator, argument, what is done to it, how the message begins: the thing, what was found, and
# after "expected" what to give instead.
WRONG = [
    ("attention", "q", whole, "q is of dtype torch.int32"),
    ("attention", "q", flat, "q is of shape (384,)"),
    ("attention", "q", lambda x: x[..., :0], "q is of shape (2, 4, 3, 0)"),
    ("attention", "k", half, "k is of dtype torch.float16"),
    ("attention", "k", elsewhere, "k is on meta"),
    ("attention", "k", longer, "k is of shape (2, 2, 3, 32)"),
    ("attention", "k", lambda x: x[:, :0], "k is of 0 heads"),
    ("attention", "v", longer, "v is of shape (2, 2, 3, 32)"),
    ("attention", "past", both(longer), "past keys is of shape (2, 2, 2, 32)"),
    ("attention", "past", both(half), "past keys is of dtype torch.float16"),
    ("attention", "key_mask", whole, "key_mask is of dtype torch.int32"),
    ("attention", "key_mask", elsewhere, "key_mask is on meta"),
    ("attention", "key_mask", longer, "key_mask is of shape (2, 10)"),
    ("attention", "doc_ids", half, "doc_ids is of dtype torch.float16"),
    ("attention", "doc_ids", longer, "doc_ids is of shape (2, 10)"),
    ("attention", "alibi_slopes", longer, "alibi_slopes is of shape (8,)"),
    ("attention", "window", lambda _: 0, "window is 0"),
    ("attention", "softcap", lambda _: float("nan"), "softcap is nan"),
    ("attention", "dropout_p", lambda _: 1.0, "dropout_p is 1.0"),
    ("attention", "seed", lambda _: None, "seed is None"),
    ("attention", "seed", whole, "seed is torch.int32 of shape ()"),
    ("attention", "impl", lambda _: "cuda", "impl is 'cuda'"),
    ("attention_decode", "cache", both(half), "cache keys is of dtype torch.float16"),
    ("attention_decode", "cache", both(longer), "cache keys is of shape (2, 2, 9, 32)"),
    ("attention_decode", "lengths", half, "lengths is of dtype torch.float16"),
    ("attention_decode", "lengths", longer, "lengths is of shape (4,)"),
    ("attention_decode", "q", lambda x: x[:, :3], "k is of 2 heads"),
    ("layernorm", "x", whole, "x is of dtype torch.int32"),
    ("layernorm", "weight", longer, "weight is of shape (16,)"),
    ("layernorm", "weight", elsewhere, "weight is on meta"),
    ("layernorm", "residual", flat, "residual is of shape (24,)"),
    ("layernorm", "eps", lambda _: 0.0, "eps is 0.0"),
    ("layernorm", "kind", lambda _: "batch", "kind is 'batch'"),
    ("ffn", "x", whole, "x is of dtype torch.int32"),
    ("ffn", "weight", longer, "weight is of shape (10, 16)"),
    ("ffn", "weight", half, "weight is of dtype torch.float16"),
    ("ffn", "bias", elsewhere, "bias is on meta"),
    ("ffn", "gate_weight", lambda _: None, "gate_weight is None"),
    ("ffn", "addend", flat, "addend is of shape (30,)"),
    ("ffn", "activation", lambda _: "tanh", "activation is 'tanh'"),
    ("cross_entropy", "hidden", longer, "head_weight is of shape (12, 8)"),
    ("cross_entropy", "head_weight", half, "head_weight is of dtype torch.float16"),
    ("cross_entropy", "targets", whole, "targets is of dtype torch.int32"),
    ("cross_entropy", "targets", longer, "targets is of shape (6,)"),
    ("cross_entropy", "targets", elsewhere, "targets is on meta"),
    ("cross_entropy", "softcap", lambda _: 0.0, "softcap is 0.0"),
    ("cross_entropy", "reduction", lambda _: "max", "reduction is 'max'"),
    ("rotary", "q", flat, "q is of shape (384,)"),
    ("rotary", "k", half, "k is of dtype torch.float16"),
    ("rotary", "cos", longer, "cos is of shape (1, 3, 16)"),
    ("rotary", "sin", longer, "sin is of shape (1, 3, 16)"),
    ("rotary", "sin", elsewhere, "sin is on meta"),
]


@pytest.mark.parametrize("operator", select.OPERATORS)
def test_nothing_else_is_wrong_with_the_arguments(good, operator):
    function, arguments = good[operator]
    function(**arguments, impl="triton")


@pytest.mark.parametrize(("operator", "argument", "change", "message"), WRONG)
def test_a_wrong_argument_is_named(good, operator, argument, change, message):
    function, arguments = good[operator]
    arguments = {"impl": "triton", **arguments}
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises(ValueError) as raised:
        function(**arguments)
    said = str(raised.value)
    assert said.startswith(f"{message}, expected ")
    assert len(said) > len(f"{message}, expected ")
    assert "\n" not in said


# What exists, and has no kernel


@pytest.fixture
def trusting(device, monkeypatch):
    """`auto` trusts every kernel, as on a GPU where all proofs hold, and has said nothing yet."""
    x = torch.empty(1, device=device)
    assert all(select.runs_triton(operator, "triton", x) for operator in select.OPERATORS)
    monkeypatch.setattr(select, "_unproven", lambda *_: None)
    monkeypatch.setattr(select, "_told", set(select.OPERATORS))


def double(x):
    if isinstance(x, tuple):
        return tuple(map(double, x))
    floats = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.double() if floats else x


def stride_apart(cache):
    return tuple(x.mT.contiguous().mT for x in cache)


def head_dim(D):
    return lambda x: x[..., :1].repeat(1, 1, 1, D)


UNSUPPORTED = [
    ("attention", {"q": double, "k": double, "v": double, "past": double}, "torch.float64 has no"),
    (
        "attention",
        {**dict.fromkeys("qkv", head_dim(257)), "past": lambda _: None, "key_mask": lambda _: None,
         "doc_ids": lambda _: None},
        "heads of 257 channels",
    ),
    ("attention_decode", {"cache": stride_apart}, "channels are not neighbours"),
    ("attention_decode", dict.fromkeys(["q", "k", "v", "cache"], double), "torch.float64 has no"),
    ("layernorm", dict.fromkeys(["x", "weight", "bias", "residual"], double), "dropout of float64"),
    ("ffn", dict.fromkeys(["x", "weight", "bias", "gate_weight", "addend"], double), "float64 has"),
    ("cross_entropy", dict.fromkeys(["hidden", "head_weight"], double), "torch.float64 has no"),
    ("rotary", dict.fromkeys("qk", head_dim(1026)), "head dim of 1026 is above"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "changes", "reason"), UNSUPPORTED)
def test_what_has_no_kernel_is_refused_by_name_and_falls_back_once_told(
    good, trusting, caplog, operator, changes, reason
):
    function, arguments = good[operator]
    arguments = {**arguments, **{name: f(arguments.get(name)) for name, f in changes.items()}}
    with pytest.raises(KernelUnavailable, match=reason) as raised:
        function(**arguments, impl="triton")
    assert str(raised.value).startswith(f"{operator}: impl='triton' cannot run: ")
    assert str(raised.value).endswith("; use impl='auto' or 'reference'")
    assert "\n" not in str(raised.value)
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        found = [function(**arguments) for _ in range(3)]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"{operator} runs its reference body here: ")
    assert reason in said[0]
    expected = function(**arguments, impl="reference")
    for results in found:
        assert all(a.equal(b) for a, b in zip(tensors(results), tensors(expected), strict=True))


def tensors(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for part in results for x in tensors(part)]


# The machine


@pytest.fixture
def nothing_found(monkeypatch):
    """As in a process that has looked for nothing yet and said nothing, and does not interpret."""
    monkeypatch.setattr(select, "_found", {})
    monkeypatch.setattr(select, "_told", set())


def no_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )


def old_triton(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")


def broken_kernels(monkeypatch):
    def refuse(name):
        raise ImportError(f"{name} is broken")

    monkeypatch.setattr(select.importlib, "import_module", refuse)


def another_mode(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", not launch.INTERPRETED)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_triton, "triton is not installed"),
        (old_triton, "triton 3.5.1 is too old, 3.6 or newer is needed"),
        (broken_kernels, "its kernels could not be loaded: "),
        (another_mode, "TRITON_INTERPRET was changed after triton was imported"),
    ],
)
def test_a_triton_that_cannot_be_used_is_the_reason(
    device, nothing_found, monkeypatch, caplog, change, reason
):
    change(monkeypatch)
    x = torch.randn(2, 4, device=device)
    with pytest.raises(KernelUnavailable, match=reason):
        layernorm(x, None, None, impl="triton")
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        found = [layernorm(x, None, None)[0] for _ in range(2)]
    said = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert len(said) == 1
    assert found[1].equal(layernorm(x, None, None, impl="reference")[0])


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "the GPU is an sm_75, and the kernels need sm_80 or newer"),
        ((8, 0), None),
        ((10, 0), None),
    ],
)
def test_a_gpu_has_to_be_new_enough(nothing_found, monkeypatch, capability, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = torch.empty(2, device="meta")
    monkeypatch.setattr(select, "_unproven", lambda *_: None)
    assert select._device_obstacle(torch.device("cuda", 0)) == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select._device_obstacle(torch.device("cuda", 0)) == "no GPU is visible"
    assert "on meta" in select._device_obstacle(x.device)


# Values


@pytest.mark.parametrize("target", [V, -1, 2**62])
def test_with_the_debug_option_a_target_outside_the_vocabulary_is_an_assertion(
    device, good, monkeypatch, target
):
    if device.type != "cpu":
        return  # test_gpu.py: no kernel runs after such an assertion
    from triton.runtime.interpreter import interpreter_builder

    function, arguments = good["cross_entropy"]
    arguments["targets"][1] = target
    assert function(**arguments, reduction="none", impl="triton")[1].isnan()
    monkeypatch.setattr(interpreter_builder, "options", DebugOptions(interpreter_builder.options))
    with pytest.raises(Exception, match="outside the vocabulary"):
        function(**arguments, impl="triton")


class DebugOptions:
    """The interpreter's options as TRITON_DEBUG=1 makes them."""

    def __init__(self, options):
        self.options = options

    def __getattr__(self, name):
        return True if name == "debug" else getattr(self.options, name)
