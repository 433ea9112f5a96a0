"""How an operator enters torch.library: defined once, with all that the compilers ask for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

# One handle for the whole package: the registrations live as long as it does.
LIBRARY: Any = torch.library.Library("gptopt", "FRAGMENT")

# Why a Triton body cannot run on an operator's arguments, or None: by the operator's name.
Supports = Callable[..., str | None]
SUPPORTS: dict[str, Supports] = {}
_REFERENCES: dict[str, Callable[..., Any]] = {}
# What `call` runs without the dispatcher: Triton bodies and the Functions around them, by name.
_BODIES: dict[str, Callable[..., Any]] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_keys_of = _C._dispatch_keys


def register(
    name: str,
    schema: str,
    *,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    function: type[torch.autograd.Function] | None = None,
) -> None:
    """Define `gptopt::name` with its reference body for every device.

    A faster body for one device is entered by `register_triton` and nothing else.

    Args:
        name: the operator's name.
        schema: arguments and results in torch.library's notation, all positional.
        body: the reference body. No result may alias an argument or another result.
        fake: the same results by shape, dtype and stride only.
        flops: the number of operations, from the arguments with each tensor given as its shape.
        function: the autograd Function around the operator, if it is differentiable.
    """
    _REFERENCES[name] = body
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptopt::{name}", fake, lib=LIBRARY)
    if function is not None:
        _FUNCTIONS[name] = function
        LIBRARY.impl(name, functools.partial(_with_autograd, name), "Autograd")
    register_flop_formula(getattr(torch.ops.gptopt, name))(flops)


def register_triton(
    name: str, body: Callable[..., Any], supports: Supports, *, interpreted: bool
) -> None:
    """Give `gptopt::name` its Triton body, on the GPU, or in the interpreter on the CPU.

    Args:
        name: an operator that `register` has defined.
        body: takes the operator's arguments; its results have the shapes, dtypes and contiguous
            strides of the reference body's and share memory with nothing.
        supports: takes the same arguments and says in a few words why the kernels cannot run on
            them ("float64 is not a dtype of its kernels"), or None. Where they cannot, the
            operator runs its reference body: who asks for a body by name has been told before.
        interpreted: `gptopt.kernels.launch.INTERPRETED`.
    """
    reference = _REFERENCES[name]

    def run(*arguments: Any) -> Any:
        return (body if supports(*arguments) is None else reference)(*arguments)

    SUPPORTS[name] = supports
    _BODIES[name] = run
    LIBRARY.impl(name, run, "CPU" if interpreted else "CUDA")


def call(name: str, *arguments: Any) -> Any:
    """`torch.ops.gptopt.name(*arguments)`, past the dispatcher where it would change nothing.

    That is where the arguments are plain and the Triton body is the one for their device. The
    dispatcher would call Python three times to arrive at the same body.
    """
    if torch.compiler.is_compiling() or name not in _BODIES or not _plain(arguments):
        return getattr(torch.ops.gptopt, name).default(*arguments)
    if torch.is_grad_enabled() and name in _FUNCTIONS and _wants_gradient(arguments):
        apply: Any = _FUNCTIONS[name].apply
        return apply(*arguments)
    return _BODIES[name](*arguments)


def _with_autograd(name: str, *arguments: Any) -> Any:
    """An operator on the Autograd key: through its Function where a gradient may be asked for."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        apply: Any = _FUNCTIONS[name].apply
        return apply(*arguments)
    # A Function is told which inputs want gradients even where none are recorded.
    with below_autograd():
        return getattr(torch.ops.gptopt, name).default(*arguments)


def _plain(arguments: Sequence[Any]) -> bool:
    """Whether nobody watches or transforms this call, and all its tensors are ordinary ones."""
    if (
        _C._len_torch_dispatch_stack()  # FakeTensorMode and the like
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _C._autograd._profiler_enabled()  # its table shows operators by name
    ):
        return False
    keys = _plain_keys()
    for x in arguments:  # one of the hottest loops of the host: no generator, few names
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            if _keys_of(x).raw_repr() not in keys:
                return False
        elif isinstance(x, Tensor):
            return False
    return True


@functools.cache
def _plain_keys() -> frozenset[int]:
    """Dispatch keys of an ordinary tensor, made in inference mode or not, where Triton runs."""
    from gptopt.kernels.launch import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        return frozenset()  # bodies that were imported to be compiled only
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            x = torch.zeros(0, device="cpu" if INTERPRETED else "cuda")
            keys.append(_C._dispatch_keys(x).raw_repr())
    return frozenset(keys)


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    for x in arguments:  # noqa: SIM110 - a generator takes twice the time
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def no_flops(*_: Any, **__: Any) -> int:
    """Only matrix products count, as in torch's own table."""
    return 0


def below_autograd() -> Any:
    """For a Function on the Autograd key: inside, calls go past autograd to the bodies."""
    return torch._C._AutoDispatchBelowAutograd()


def recompute_gradients(
    body: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    output_mask: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients of the reference `body(*inputs)`, found by running it again under autograd.

    Returns one tensor for each input: its gradient where `output_mask` asks for it, else one
    without elements. `grads` belong to the body's results; None is a result that nobody used.
    """
    with _autograd_again(), torch.enable_grad():
        leaves = [
            None if x is None else x.detach().requires_grad_(wanted)
            for x, wanted in zip(inputs, output_mask, strict=True)
        ]
        results = body(*leaves)
        results = (results,) if isinstance(results, Tensor) else results
        used = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(_grad(used, wanted))
    taken = {_storage(grad) for grad in grads if grad is not None}
    return tuple(
        _own(next(found), taken) if x is not None and x.requires_grad else _nothing(leaves)
        for x in leaves
    )


def fake_gradients(
    inputs: Sequence[Tensor | None], output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What `recompute_gradients` returns, by shape and dtype."""
    return tuple(
        _nothing(inputs) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in zip(inputs, output_mask, strict=True)
    )


def masked(
    gradients: Sequence[Tensor | None], output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None in place of the others: what a Function returns."""
    return tuple(
        gradient if wanted else None
        for gradient, wanted in zip(gradients, output_mask, strict=True)
    )


def _nothing(like: Sequence[Tensor | None]) -> Tensor:
    first = like[0]
    assert first is not None
    return first.new_empty(0)


def _own(gradient: Tensor, taken: set[int]) -> Tensor:
    """Contiguous, and sharing memory with none of the tensors before it: operators may not."""
    gradient = gradient.contiguous()
    if _storage(gradient) in taken:
        gradient = gradient.clone()
    taken.add(_storage(gradient))
    return gradient


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _grad(used: list[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> Sequence[Tensor]:
    if not wanted:
        return ()
    if not used:
        return [torch.zeros_like(x) for x in wanted]
    results, grads = zip(*used, strict=True)
    return torch.autograd.grad(results, wanted, grads, allow_unused=True, materialize_grads=True)


def _autograd_again() -> Any:
    """Autograd records inside, also where a caller has switched its dispatch keys off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
