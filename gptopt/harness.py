"""lm-evaluation-harness on our models: its tasks asked of a PyTorch model or an exported folder.

`python -P -m gptopt.harness --model gptopt --model_args model=DIR --tasks NAME` is the harness's
command with our model added; in Python, `lm_eval.simple_evaluate(model=HarnessModel("DIR"), ...)`.
Needs gptopt[eval]. Tasks come from the harness, which may download them; those in local files need
no network (`--include_path`).
"""

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from gptopt import log
from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.likelihood import open_likelihood
from gptopt.runtime.generation import prompt_ids

_AT_ONCE = 256  # requests scored together


@register_model("gptopt")
class HarnessModel(LM):  # type: ignore[misc]  # untyped where the harness is not installed
    """What lm-evaluation-harness asks of a model: likelihoods and continuations.

    Args:
        model: model folder, run folder, Hugging Face folder or exported folder.
        checkpoint: of a run: best, last, or a step number.
        on: device of a PyTorch model, such as cuda; of an exported folder its provider.
        precision: of an exported folder: which file runs.
        device, batch_size, max_batch_size: what the harness gives to every model. They are not
            used: its default device is a GPU, be there one or not, and memory chooses batches.

    Raises:
        UserError: the model cannot be used.
    """

    def __init__(
        self,
        model: str,
        checkpoint: str = "auto",
        on: str = "auto",
        precision: str = "auto",
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        self._model = open_likelihood(
            model, checkpoint=str(checkpoint), device=on, precision=precision
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding says it) of each (context, continuation)."""
        pairs = [self._model.pair(*request.args) for request in requests]
        found = []
        for begin in range(0, len(pairs), _AT_ONCE):
            found += self._model.score(pairs[begin : begin + _AT_ONCE])
        return [(each.log_probability, each.greedy) for each in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts, each token scored once, in windows as long as the model's context.

        The last window, shorter than the others, sees as much before it as fits.
        """
        return [self._whole(request.args[0]) for request in requests]

    def _whole(self, text: str) -> float:
        ids, size = self._model.tokenizer.encode(text), self._model.block_size
        pairs = [
            (ids[max(0, begin - size) : begin], ids[begin : begin + size])
            for begin in range(0, len(ids), size)
        ]
        return sum(each.log_probability for each in self._model.score(pairs))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to one of its stop texts, which is left out."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, wanted: dict[str, Any]) -> str:
        until = wanted.get("until") or []
        sampling = SamplingOptions(
            max_new_tokens=wanted.get("max_gen_toks", 256),
            temperature=wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0,
            top_p=wanted.get("top_p", 1.0) or 1.0,
            top_k=wanted.get("top_k", 0) or 0,
            stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
        )
        room = max(1, self._model.block_size - sampling.max_new_tokens)
        ids = prompt_ids(self._model.tokenizer, context)[-room:]
        return self._model.complete([ids], sampling, context="slide").rows[0].text


def main() -> int:
    """The harness's command line, with our model among those it knows."""
    log.configure()
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"gptopt: error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
