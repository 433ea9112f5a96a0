"""`gptopt generate`: continue a prompt with a PyTorch model, by the edge's own loop.

The loop, the stops, the context edge and the filters are gptopt.runtime's; the model's scores and
cache, kept on its device, are gptopt.decoders'.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gptopt.checkpoint import load_model
from gptopt.config import GenerateOptions, SamplingOptions
from gptopt.config_classifier import says_next
from gptopt.decoders import StaticDecoder, TorchDecoder
from gptopt.errors import UserError
from gptopt.model import GPT, Classifier
from gptopt.runtime.folder import end_ids as end_ids_of
from gptopt.runtime.folder import is_edge_folder
from gptopt.runtime.generation import Completion, Context, OnText, OnToken, complete, prompt_ids
from gptopt.runtime.guess import guess_masks, show_guesses
from gptopt.runtime.label import Forward, label_texts, show_labels
from gptopt.runtime.verbs import continue_prompts
from gptopt.tokenizer import Tokenizer


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
    static_cache: bool | None = None,
) -> Completion:
    """Continue a batch of prompts (token ids); see gptopt.runtime.generation.complete.

    Without a tokenizer every id of the vocabulary may be chosen. `static_cache` chooses the form of
    the cache: None is a static one on a CUDA GPU, where the decode step becomes a CUDA graph.

    Raises:
        UserError: the model is not causal, or a prompt does not fit.
    """
    if not says_next(model.config):
        raise UserError(
            "this is a masked language model or a classifier, it cannot continue a text; use a"
            " causal one"
        )
    if static_cache is None:
        static_cache = next(model.parameters()).device.type == "cuda"
    decoder = StaticDecoder if static_cache else TorchDecoder
    with _inference(model):
        return complete(
            decoder(model, None if tokenizer is None else tokenizer.size),
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

    A masked language model guesses what its prompts' masks stand for, a classifier labels them.

    Returns:
        What gptopt.runtime.verbs.continue_prompts, or gptopt.runtime.guess.show_guesses, returns,
        with `device`.

    Raises:
        UserError: no such model or device, a model without a tokenizer, or a prompt that does not
            fit.
    """
    from gptopt.training.hardware import resolve_device

    if is_edge_folder(Path(options.model)):
        raise UserError(f"{options.model}: is an exported folder; use gptopt run")
    device = resolve_device(options.device)
    loaded = load_model(
        options.model, checkpoint=options.checkpoint, device=device, kernels=options.kernels,
        adapter=options.adapter,
    )  # fmt: skip
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.folder}: has no tokenizer.json, so it cannot read a prompt")
    if isinstance(loaded.model, Classifier):
        return _label(loaded.model, tokenizer, options, {"device": str(device)})
    if not loaded.model.config.causal:
        return _guess(loaded.model, tokenizer, options, {"device": str(device)})
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


def _guess(
    model: GPT, tokenizer: Tokenizer, options: GenerateOptions, where: dict[str, str]
) -> dict[str, Any]:
    def forward(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with _inference(model):
            logits = model(torch.from_numpy(ids).to(next(model.parameters()).device)).logits
            return logits.float().cpu().numpy()  # type: ignore[no-any-return]  # numpy of torch

    results = guess_masks(forward, tokenizer, options.prompt, model.config.block_size)
    return show_guesses(results, where, json_output=options.json_output)


def labeller(model: Classifier) -> Forward:
    """What scores ids and mask (B, T), both numpy, with a PyTorch classifier."""

    def forward(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        device = next(model.parameters()).device
        with _inference(model):
            given, real = (torch.from_numpy(part).to(device) for part in (ids, mask))
            logits = model(given, attention_mask=real).logits
        return logits.float().cpu().numpy()  # type: ignore[no-any-return]  # numpy of torch

    return forward


def _label(
    model: Classifier, tokenizer: Tokenizer, options: GenerateOptions, where: dict[str, str]
) -> dict[str, Any]:
    config = model.config
    results = label_texts(
        labeller(model), tokenizer, options.prompt, labels=config.labels,
        multi_label=config.multi_label, block_size=config.block_size,
    )  # fmt: skip
    return show_labels(results, where, json_output=options.json_output)


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
