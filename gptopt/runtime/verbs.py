"""`gptopt run`: continue a prompt with an exported folder. gptopt.generate shows its text alike."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from gptopt.config import GenerateOptions, RunOptions
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.runtime.generation import Completion, Context, Generated, OnText, prompt_ids
from gptopt.runtime.guess import guess_masks, show_guesses
from gptopt.runtime.label import label_texts, show_labels
from gptopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Completer(Protocol):
    """Either model's method that continues a batch of prompts."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: RunOptions | GenerateOptions,
        *,
        context: Context,
        on_text: OnText | None,
    ) -> Completion:
        """As gptopt.runtime.generation.complete."""


def run(options: RunOptions) -> dict[str, Any]:
    """Continue the prompts in onnxruntime; with --tune, measure its threads first.

    A masked language model guesses what its prompts' masks stand for (gptopt.runtime.guess), a
    classifier labels them (gptopt.runtime.label).

    Returns:
        What `continue_prompts` or `show_guesses` returns, with `provider` and `precision`, what
        ran, and `adapter` where one is on; with --tune also `tuning` (gptopt.runtime.tune.Tuning),
        alone where there is no prompt.

    Raises:
        UserError: no exported folder, it or this machine has not what was asked for, or the prompt
            does not fit.
        CheckFailed: the folder was changed since its export.
    """
    from gptopt.runtime.edge import EdgeModel

    tuning = _tune(options) if options.tune else {}
    if tuning and not options.prompt:
        return tuning
    model = EdgeModel(
        Path(options.folder),
        precision=options.precision,
        adapter=options.adapter,
        provider=options.provider,
        threads=options.threads,
    )
    if model.tokenizer is None:
        raise UserError(f"{options.folder}: was exported without a tokenizer, so it reads no text")
    where = {"provider": model.provider, "precision": model.precision}
    if model.adapter is not None:
        where["adapter"] = model.adapter
    labels = model.config["labels"]
    if labels is not None:
        _require_prompt(options)
        several = model.config["multi_label"]
        found = label_texts(
            lambda ids, mask: model.forward(ids, mask)[0], model.tokenizer, options.prompt,
            labels=labels, multi_label=several, block_size=model.block_size,
        )  # fmt: skip
        return {**show_labels(found, where, json_output=options.json_output), **tuning}
    if not model.config["causal"]:
        _require_prompt(options)
        guessed = guess_masks(
            lambda ids: model.forward(ids)[0], model.tokenizer, options.prompt, model.block_size
        )
        return {**show_guesses(guessed, where, json_output=options.json_output), **tuning}
    return {**continue_prompts(model.complete, model.tokenizer, options, where), **tuning}


def _tune(options: RunOptions) -> dict[str, Any]:
    from gptopt.runtime.tune import tune

    if options.threads:
        raise UserError("--threads: --tune finds the number itself; leave one of them out")
    found = tune(Path(options.folder), precision=options.precision, provider=options.provider)
    if not options.json_output and not options.prompt:
        chosen, kept = found.settings, "" if found.kept else " (not kept)"
        say(f"{chosen.threads} threads, spinning {chosen.spinning}{kept}")
    return {"tuning": found.as_dict()}


def continue_prompts(
    complete: Completer,
    tokenizer: Tokenizer,
    options: RunOptions | GenerateOptions,
    where: dict[str, str],
) -> dict[str, Any]:
    """Continue a verb's prompts and, without --json, show the text as it comes.

    Returns:
        results: of each prompt: prompt, text, tokens (the new ids, the one that ended the text
            included), finish_reason (eos, stop, length or context), prompt_tokens, new_tokens;
        the keys of the only result again, where there was one prompt;
        seed, prompt_tokens and new_tokens (of all), time_to_first_token_ms, tokens_per_second
        (after the first token, all prompts together; null where there was no second token);
        and `where` it ran.
    """
    _require_prompt(options)
    alone = len(options.prompt) == 1
    shown = not options.json_output
    live = shown and alone
    ids = [prompt_ids(tokenizer, prompt) for prompt in options.prompt]
    streamed = _Streamed(options.prompt[0]) if live else None
    try:
        done = complete(ids, options, context=options.context, on_text=streamed)
        if streamed is not None:
            streamed(0, "")  # the prompt, where nothing came after it
    finally:
        if streamed is not None:
            streamed.end()
    results = [_result(prompt, row) for prompt, row in zip(options.prompt, done.rows, strict=True)]
    if shown and not alone:
        say("\n---\n".join(result["prompt"] + result["text"] for result in results))
    speed = done.tokens_per_second
    summary = {
        "results": results,
        **(results[0] if alone else {}),
        "seed": options.seed,
        "prompt_tokens": sum(row.prompt_tokens for row in done.rows),
        "new_tokens": done.new_tokens,
        "time_to_first_token_ms": round(done.first_token_ms, 3),
        "tokens_per_second": None if speed is None else round(speed, 2),
        **where,
    }
    if shown:
        _tell(summary, where)
    return summary


def _require_prompt(options: RunOptions | GenerateOptions) -> None:
    if not options.prompt:
        raise UserError("there is no prompt to continue; give one with --prompt")


class _Streamed:
    """Writes the prompt once the first text arrives, and every piece behind it."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._begun = False

    def __call__(self, row: int, text: str) -> None:
        say(text if self._begun else self._prompt + text, end="")
        self._begun = True

    def end(self) -> None:
        if self._begun:
            say()


def _result(prompt: str, row: Generated) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": row.text,
        "tokens": row.tokens,
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_tokens,
        "new_tokens": len(row.tokens),
    }


def _tell(summary: dict[str, Any], where: dict[str, str]) -> None:
    """How it went, on stderr."""
    if any(result["finish_reason"] == "context" for result in summary["results"]):
        logger.warning("the context is full; --context slide drops the oldest tokens and goes on")
    if sys.stderr.isatty():
        speed = summary["tokens_per_second"]
        logger.info(
            "%s: first token after %.0f ms%s",
            " ".join(where.values()),
            summary["time_to_first_token_ms"],
            "" if speed is None else f", then {speed:.1f} tokens/s",
        )
