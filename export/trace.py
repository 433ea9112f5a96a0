"""The first stage: a PyTorch model recorded by torch.export, each operator one opaque node."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gptopt.config import ModelConfig
from gptopt.errors import UserError, first_line
from gptopt.export.contract import Contract

Cache = tuple[Tensor, Tensor]

PREFIX = "model."  # what the wrapper below puts before each parameter's name

# Sizes of the example. None is 0 or 1, which torch.export would take for constants, and all differ.
_BATCH, _NEW, _PAST = 2, 3, 5


class Output(Protocol):
    """What a model returns: (B, T, V) logits and per layer the keys and values, (B, K, S, D)."""

    @property
    def logits(self) -> Tensor | None: ...  # noqa: D102 - the class says

    @property
    def present(self) -> Sequence[Cache] | None: ...  # noqa: D102 - the class says


class Exportable(Protocol):
    """Any module with these two can be exported; it need not be gptopt's GPT.

    `config` states the sizes (n_layer, kv_heads, head_size, vocab_size, block_size, causal).
    A call is model(ids, attention_mask=..., position_ids=..., past=..., use_cache=...), where
    ids and position_ids are (B, T), attention_mask is (B, S) and past is a list of (key, value).
    Where it takes `logits_to_keep` as well (so many last positions), proofs of long texts are
    cheaper.
    """

    config: ModelConfig

    def __call__(self, ids: Tensor, **keywords: Any) -> Output: ...  # noqa: D102 - the class says


def trace(model: nn.Module, contract: Contract) -> ExportedProgram:
    """Record the model's forward pass for any batch, length and cache.

    Raises:
        UserError: the model is not in evaluation mode, float32 and on the CPU, or cannot be
            recorded.
    """
    _check(model)
    wrapped = _WithCache(model) if contract.causal else _WithoutCache(model)
    with torch.no_grad(), quiet():
        try:
            return torch.export.export(
                wrapped, _example(contract), dynamic_shapes=_dynamic(contract), strict=False
            )
        except Exception as error:
            # torch.export has no common base class for what a model can do wrong.
            raise UserError(
                f"{type(model).__name__}: torch.export cannot record it ({first_line(error)}); "
                f"its forward pass may not depend on the values or the number of tokens"
            ) from error


class _WithCache(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        output = self.model(
            ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past,
            use_cache=True,
        )
        return output.logits, [(key, value) for key, value in output.present]


class _WithoutCache(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            ids, attention_mask=attention_mask, position_ids=position_ids
        ).logits
        return logits


def _example(contract: Contract) -> tuple[Any, ...]:
    cached = _PAST if contract.causal else 0
    # Not one tensor twice: torch.export would take the two inputs for one.
    ids, positions = torch.zeros(2, _BATCH, _NEW, dtype=torch.int64)
    mask = torch.ones(_BATCH, cached + _NEW, dtype=torch.int64)
    if not contract.causal:
        return ids, mask, positions
    shape = (_BATCH, contract.kv_heads, cached, contract.head_size)
    return (
        ids,
        mask,
        positions,
        [(torch.zeros(shape), torch.zeros(shape)) for _ in _layers(contract)],
    )


def _dynamic(contract: Contract) -> tuple[Any, ...]:
    """Which sizes vary. How they depend on one another is for torch.export to find."""
    tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if not contract.causal:
        return tokens, tokens, tokens
    cache = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return tokens, tokens, tokens, [(cache, cache) for _ in _layers(contract)]


def _layers(contract: Contract) -> range:
    return range(contract.n_layer)


def _check(model: nn.Module) -> None:
    if model.training:
        raise UserError(f"{type(model).__name__}: is in training mode; call model.eval() first")
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise UserError(f"{name}: is on {tensor.device}, export on the CPU: call model.cpu()")
        if tensor.dtype != torch.float32:
            raise UserError(
                f"{name}: is {tensor.dtype}, the export takes float32; call model.float() first"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own deprecation notes about itself from the user."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.|copyreg|onnx")
        yield
