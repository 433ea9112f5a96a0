"""`gptopt generate`: continue a prompt with a PyTorch model, by the edge's own loop.

The loop, the stops, the context edge and the filters are gptopt.runtime's; here are the model's
scores and cache, kept on its device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gptopt import sampling as sampler
from gptopt.checkpoint import load_model
from gptopt.config import GenerateOptions, SamplingOptions
from gptopt.errors import UserError
from gptopt.model import GPT
from gptopt.model.block import Cache
from gptopt.runtime.folder import end_ids as end_ids_of
from gptopt.runtime.folder import is_edge_folder
from gptopt.runtime.generation import Completion, Context, OnText, OnToken, complete, prompt_ids
from gptopt.runtime.verbs import continue_prompts
from gptopt.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class TorchDecoder:
    """A GPT as the generation loop sees it, with its cache.

    Args:
        model: a causal model.
        tokenizer_size: ids that may be chosen; None: all of the vocabulary.
    """

    def __init__(self, model: GPT, tokenizer_size: int | None) -> None:
        assert model.config.vocab_size is not None  # GPT demands it
        self.block_size = model.config.block_size
        self.vocab_size = model.config.vocab_size
        self.tokenizer_size = tokenizer_size or self.vocab_size
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: list[Cache] | None = None

    def prefill(self, ids: Ints, mask: Bools) -> Tensor:
        """Forget the cache and read ids (B, T); scores (B, V) of the last position."""
        self._cache = None
        return self.decode(ids, mask)

    def decode(self, ids: Ints, mask: Bools) -> Tensor:
        """Read ids (B, T) after the cache, with mask (B, S) over all; scores (B, V)."""
        output = self._model(
            torch.from_numpy(ids).to(self._device),
            # Without padding the mask says nothing, and attention is faster without one.
            attention_mask=None if mask.all() else torch.from_numpy(mask).to(self._device),
            past=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.present
        scores: Tensor = output.logits[:, -1]
        return scores

    def choose(
        self,
        scores: Tensor,
        sampling: SamplingOptions,
        seen: Bools | None,
        draws: npt.NDArray[np.float64],
    ) -> Ints:
        """The next token of each row, (B,)."""
        chosen = sampler.choose(
            scores,
            self.tokenizer_size,
            sampling,
            None if seen is None else torch.from_numpy(seen).to(scores.device),
            torch.from_numpy(draws),
        )
        array: Ints = chosen.cpu().numpy()
        return array


def generate_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    *,
    tokenizer: Tokenizer | None = None,
    end_ids: Sequence[int] = (),
    context: Context = "error",
    on_text: OnText | None = None,
    on_token: OnToken | None = None,
) -> Completion:
    """Continue a batch of prompts (token ids); see gptopt.runtime.generation.complete.

    Without a tokenizer every id of the vocabulary may be chosen.

    Raises:
        UserError: the model is not causal, or a prompt does not fit.
    """
    if not model.config.causal:
        raise UserError(
            "this is a masked language model, it cannot continue a text; use a causal one"
        )
    with _inference(model):
        return complete(
            TorchDecoder(model, None if tokenizer is None else tokenizer.size),
            prompts,
            sampling,
            tokenizer=tokenizer,
            end_ids=end_ids,
            context=context,
            on_text=on_text,
            on_token=on_token,
        )


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingOptions) -> str:
    """The text that continues `prompt`, without it; an overlong context slides."""
    done = generate_tokens(
        model,
        [prompt_ids(tokenizer, prompt)],
        sampling,
        tokenizer=tokenizer,
        end_ids=[tokenizer.eos_id],
        context="slide",
    )
    return done.rows[0].text


def generate(options: GenerateOptions) -> dict[str, Any]:
    """Continue the prompts of `gptopt generate`.

    Returns:
        What gptopt.runtime.verbs.continue_prompts returns, with `device`.

    Raises:
        UserError: no such model or device, a model without a tokenizer, or a prompt that does not
            fit.
    """
    from gptopt.training.hardware import resolve_device

    if is_edge_folder(Path(options.model)):
        raise UserError(f"{options.model}: is an exported folder; use gptopt run")
    device = resolve_device(options.device)
    loaded = load_model(
        options.model, checkpoint=options.checkpoint, device=device, kernels=options.kernels
    )
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.folder}: has no tokenizer.json, so it cannot read a prompt")
    ends = sorted({tokenizer.eos_id, *end_ids_of(loaded.folder)})

    def completer(
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        *,
        context: Context,
        on_text: OnText | None,
    ) -> Completion:
        return generate_tokens(
            loaded.model,
            prompts,
            sampling,
            tokenizer=tokenizer,
            end_ids=ends,
            context=context,
            on_text=on_text,
        )

    return continue_prompts(completer, tokenizer, options, {"device": str(device)})


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside, the model's own mode again outside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
