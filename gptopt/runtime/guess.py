"""What a masked language model puts in the place of a mask; PyTorch models are played alike."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import UserError
from gptopt.log import say
from gptopt.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Forward = Callable[[Ints], npt.NDArray[np.float32]]  # ids (1, T) -> logits (1, T, V)

GUESSES = 5  # shown of each mask


def guess_masks(
    forward: Forward, tokenizer: Tokenizer, prompts: Sequence[str], block_size: int
) -> list[dict[str, Any]]:
    """The likeliest tokens in the place of every mask of some prompts.

    Returns:
        Of each prompt: prompt, text (the prompt with the likeliest token in each mask's place) and
        masks, of each: position (in tokens) and guesses, best first: token, text, probability.

    Raises:
        UserError: the tokenizer or a prompt has no mask, or a prompt does not fit.
    """
    if tokenizer.mask_id is None:
        raise UserError("the model's tokenizer has no mask token, so nothing can be asked for")
    return [_guess(forward, tokenizer, prompt, block_size) for prompt in prompts]


def _guess(forward: Forward, tokenizer: Tokenizer, prompt: str, block_size: int) -> dict[str, Any]:
    assert tokenizer.mask_id is not None
    ids = np.array(tokenizer.encode_with_control(prompt, {tokenizer.mask_id}), dtype=np.int64)
    places = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(places):
        name = tokenizer.token(tokenizer.mask_id)
        raise UserError(f"--prompt {prompt[:60]!r}: has no {name}, the token that is to be guessed")
    if len(ids) > block_size:
        raise UserError(
            f"--prompt {prompt[:60]!r}: has {len(ids)} tokens, the model sees {block_size}; "
            f"shorten it"
        )
    logits = forward(ids[None])[0, places].astype(np.float64)  # (masks, V)
    logits[:, tokenizer.size :] = -np.inf
    logits[:, list(tokenizer.control_ids)] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    chances = np.exp(logits)
    chances /= chances.sum(axis=-1, keepdims=True)
    best = np.argsort(-chances, axis=-1, kind="stable")[:, :GUESSES]
    masks = [
        {
            "position": int(place),
            "guesses": [
                {"token": int(token), "text": tokenizer.decode([token]), "probability": row[token]}
                for token in tokens
            ],
        }
        for place, tokens, row in zip(places.tolist(), best.tolist(), chances.tolist(), strict=True)
    ]
    ids[places] = best[:, 0]
    return {"prompt": prompt, "text": tokenizer.decode(ids), "masks": masks}


def show_guesses(
    results: list[dict[str, Any]], where: dict[str, str], *, json_output: bool
) -> dict[str, Any]:
    """The verb's JSON object; without --json its results are shown too."""
    if not json_output:
        for result in results:
            say(result["text"])
            for mask in result["masks"]:
                guesses = (f"{g['text']!r} {g['probability']:.1%}" for g in mask["guesses"])
                say(f"  token {mask['position']}: {', '.join(guesses)}")
    alone = results[0] if len(results) == 1 else {}
    return {"results": results, **alone, **where}
