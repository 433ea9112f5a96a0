"""An exported model in onnxruntime: checked before it is parsed, run on the provider asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.runtime import sampling as sampler
from gptopt.runtime.folder import load_config, load_tokenizer, model_file, verify_folder
from gptopt.runtime.generation import Completion, Context, OnText, OnToken, complete, positions
from gptopt.runtime.session import Session

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Cache = list[tuple[Floats, Floats]]

_SCORES_AT_ONCE = 2**24  # float32 logits of one part of a prompt: 64 MiB
_SHORTEST_PART = 16  # tokens; shorter ones would read the weights too often


class EdgeModel:
    """A verified exported folder, ready to run.

    Attributes:
        tokenizer: the folder's tokenizer; None where the model was exported without one.
        config: sizes and end-of-text ids (gptopt.runtime.folder.EdgeConfig).
        provider: name of the provider that runs, such as "cpu".
        block_size, vocab_size, tokenizer_size: tokens seen at once, ids that the model knows, ids
            that may be chosen.
    """

    def __init__(
        self, folder: Path | str, *, provider: str = "cpu", threads: int = 0, verify: bool = True
    ) -> None:
        """Check the folder and load it.

        Args:
            folder: what gptopt export wrote.
            provider: onnxruntime execution provider, such as cpu or cuda.
            threads: of onnxruntime; 0 takes one per physical core.
            verify: check the manifest. Leave it out only for a folder that this process wrote.

        Raises:
            UserError: no exported folder, or the provider is not available here.
            CheckFailed: the folder was changed, or the graph is not what config.json says.
        """
        folder = Path(folder)
        if verify:
            verify_folder(folder)
        self.config = load_config(folder)
        self.tokenizer = load_tokenizer(folder, self.config["tokenizer_size"])
        if self.tokenizer is not None:
            self.config["eos_ids"] = sorted({*self.config["eos_ids"], self.tokenizer.eos_id})
        self._session = Session(model_file(folder), self.config, provider, threads)
        self.provider = self._session.provider
        self.block_size = self.config["block_size"]
        self.vocab_size = self.config["vocab_size"]
        self.tokenizer_size = self.config["tokenizer_size"]
        self._cache: list[Any] = []
        self._folder = folder

    def forward(
        self,
        ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        past: Cache | None = None,
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Scores of every position, and the cache.

        Args:
            ids: (B, T) token ids.
            attention_mask: (B, S) with S = P + T, nonzero for real tokens; none: all are real.
            position_ids: (B, T); none: real tokens counted from 0.
            past: per layer keys and values, each (B, K, P, D); none: P = 0.

        Returns:
            logits (B, T, V) float32, and per layer keys and values, each (B, K, S, D).
        """
        ids = np.asarray(ids, dtype=np.int64)
        B, T = ids.shape
        P = past[0][0].shape[2] if past else 0
        real: Bools = np.ones((B, P + T), dtype=np.bool_)
        if attention_mask is not None:
            real = np.asarray(attention_mask).astype(np.bool_)
        order = positions(real, T) if position_ids is None else np.asarray(position_ids, np.int64)
        flat = [array for pair in past or () for array in pair]
        logits, present = self._session.run(ids, real, order, flat)
        arrays = [value.numpy() for value in present]
        return logits, list(zip(arrays[::2], arrays[1::2], strict=True))

    def prefill(self, ids: Ints, mask: Bools) -> Floats:
        """Forget the cache and read ids (B, T); scores (B, V) of the last position."""
        B, T = ids.shape
        # The graph scores every position; read in parts, those scores stay small: of 16 prompts
        # of 1024 tokens GPT-2's would take 3 GiB.
        step = max(_SHORTEST_PART, _SCORES_AT_ONCE // (B * self.vocab_size))
        self._cache = []
        for begin in range(0, T, step):
            end = min(begin + step, T)
            scores = self._read(ids[:, begin:end], mask[:, :end])
        return scores

    def decode(self, ids: Ints, mask: Bools) -> Floats:
        """Read one more column, ids (B, 1), with mask (B, S) over all; scores (B, V)."""
        return self._read(ids, mask)

    def _read(self, ids: Ints, mask: Bools) -> Floats:
        order = positions(mask, ids.shape[1])
        logits, self._cache = self._session.run(ids, mask, order, self._cache)
        return logits[:, -1]

    def choose(
        self,
        scores: Floats,
        sampling: SamplingOptions,
        seen: Bools | None,
        draws: npt.NDArray[np.float64],
    ) -> Ints:
        """The next token of each row, (B,)."""
        return sampler.choose(scores, self.tokenizer_size, sampling, seen, draws)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        *,
        context: Context = "error",
        end_ids: Sequence[int] | None = None,
        on_text: OnText | None = None,
        on_token: OnToken | None = None,
    ) -> Completion:
        """Continue a batch of prompts; see gptopt.runtime.generation.complete.

        `end_ids` replaces the folder's own end-of-text ids; () never ends a text early.
        """
        if not self.config["causal"]:
            raise UserError(
                f"{self._folder}: is a masked language model without a cache, it cannot generate; "
                f"export a causal model"
            )
        return complete(
            self,
            prompts,
            sampling,
            tokenizer=self.tokenizer,
            end_ids=self.config["eos_ids"] if end_ids is None else end_ids,
            context=context,
            on_text=on_text,
            on_token=on_token,
        )

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        context: Context = "error",
        on_token: OnToken | None = None,
        *,
        end_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, the one that ended the text included."""
        done = self.complete(
            prompt_ids, sampling, context=context, end_ids=end_ids, on_token=on_token
        )
        return [row.tokens for row in done.rows]
