"""An exported model in onnxruntime: checked before it is parsed, run on the provider asked for."""

import contextlib
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptopt.config import SamplingOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import sha256_of
from gptopt.runtime import cache_file, settings
from gptopt.runtime import sampling as sampler
from gptopt.runtime.adapters import adapter_file, adapter_names, read_adapter
from gptopt.runtime.cache import Cache, GrowingCache
from gptopt.runtime.folder import (
    file_marks,
    load_config,
    load_tokenizer,
    model_file,
    verified,
)
from gptopt.runtime.generation import Completion, Context, OnText, OnToken, complete, positions
from gptopt.runtime.session import Prepared, Session
from gptopt.runtime.shared import SharedCache
from gptopt.runtime.variants import AUTO, choose
from gptopt.tokenizer import Tokenizer

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Arrays = list[tuple[Floats, Floats]]


class EdgeModel:
    """A verified exported folder, ready to run.

    Attributes:
        config: sizes and end-of-text ids (gptopt.runtime.folder.EdgeConfig).
        provider: name of the provider that runs, such as "cpu".
        precision, file: of the ONNX file that runs (gptopt.runtime.variants).
        settings: how onnxruntime's threads work.
        block_size, vocab_size, tokenizer_size: tokens seen at once, ids that the model knows, ids
            that may be chosen.
        adapters: names of the LoRA adapters that the folder carries. adapter: the one that is on.
        cache: what the last generation has read; the next one without a cache of its own
            overwrites it, so `branch()` what is to stay.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        precision: str = AUTO,
        adapter: str | None = None,
        provider: str = "cpu",
        threads: int = 0,
        spinning: settings.Spinning | None = None,
        verify: bool = True,
    ) -> None:
        """Check the folder and load one of its ONNX files.

        Args:
            folder: what gptopt export wrote.
            precision: such as fp32, q8 or q4; auto: the first that the export wrote.
            adapter: the LoRA adapter that is on at first; none: the base alone.
            provider: onnxruntime execution provider, such as cpu or cuda.
            threads: of onnxruntime; 0: as `gptopt run --tune` measured on this machine, else one
                per physical core.
            spinning: how waiting threads spend their time (gptopt.runtime.settings.Settings);
                none: as measured, else they sleep.
            verify: check the manifest. Leave it out only for a folder that this process wrote.

        Raises:
            UserError: no exported folder, or it or this machine has not what was asked for.
            CheckFailed: the folder was changed, or the graph is not what config.json says.
        """
        folder = Path(folder)
        self._folder = folder
        self._marks = file_marks(folder) if verify else None
        with verified(folder, precision) if verify else contextlib.nullcontext():
            self.config = load_config(folder)
            self.precision, self.file = choose(folder, precision)
            self.settings = settings.chosen(provider.lower(), threads, spinning)
            self._path = model_file(folder, self.file.file)
            self._session = Session(
                self._path, self.config, provider, file=self.file, settings=self.settings
            )
        self._check_unchanged()
        self.provider = self._session.provider
        self.block_size = self.config["block_size"]
        self.vocab_size = self.config["vocab_size"]
        self.tokenizer_size = self.config["tokenizer_size"]
        self.cache: Cache | None = None
        self._own: Cache | None = None  # the one that belongs to no caller, kept for its memory
        self._given: Cache | None = None
        self._identity = ""
        self.adapters = adapter_names(folder)
        self.adapter: str | None = None
        self._prepared: dict[str, Prepared] = {}
        self.use_adapter(adapter)

    def use_adapter(self, name: str | None) -> None:
        """Switch one of the folder's LoRA adapters on, or with None off, for all that follows.

        The first time it is read and checked, later the switch takes microseconds. A cache goes on
        with the adapter that it was read with only.

        Raises:
            UserError: the folder has no such adapter.
            CheckFailed: its file was changed, or does not fit the graph.
        """
        if name is not None and name not in self._prepared:
            verify = self._marks is not None
            matrices = read_adapter(self._folder, name, self._session.slots, verify=verify)
            self._check_unchanged()
            self._prepared[name] = self._session.prepare(matrices)
        self._session.adapter = None if name is None else self._prepared[name]
        self.adapter = name

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer; None where the model was exported without one.

        It is read when it is first asked for: who works with token ids never waits for it.

        Raises:
            CheckFailed: it has another number of ids than config.json says, or the folder was
                changed since the model was loaded.
        """
        tokenizer = load_tokenizer(self._folder, self.config["tokenizer_size"])
        self._check_unchanged()
        return tokenizer

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text: those of the folder, and the tokenizer's own."""
        own = set() if self.tokenizer is None else {self.tokenizer.eos_id}
        return sorted({*self.config["eos_ids"], *own})

    def _check_unchanged(self) -> None:
        """The files are still those that were checked."""
        if self._marks is not None and file_marks(self._folder) != self._marks:
            raise CheckFailed(f"{self._folder}: was changed while it was read; load it again")

    def forward(
        self,
        ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        past: Arrays | None = None,
    ) -> tuple[npt.NDArray[np.float32], Arrays]:
        """Scores of every position, and the cache as arrays: for measuring, not for generating.

        Args:
            ids: (B, T) token ids.
            attention_mask: (B, S) with S = P + T, nonzero for real tokens; none: all are real.
            position_ids: (B, T); none: real tokens counted from 0.
            past: per layer keys and values, each (B, K, P, D); none: P = 0.

        Returns:
            logits (B, T, V) float32, of a classifier (B, L) of its labels; and per layer keys and
            values, each (B, K, S, D).

        Raises:
            UserError: rows are padded where the file takes no padding.
        """
        ids = np.asarray(ids, dtype=np.int64)
        B, T = ids.shape
        P = past[0][0].shape[2] if past else 0
        real: Bools = np.ones((B, P + T), dtype=np.bool_)
        if attention_mask is not None:
            real = np.asarray(attention_mask).astype(np.bool_)
        late = P > 0 or bool((real[:, 1:] > real[:, :-1]).any())
        if self.file.padding == "right" and late and not real.all():
            raise UserError(
                f"{self._path}: takes rows padded on the right only, and none behind a cache; "
                f"choose another precision or target"
            )
        order = positions(real, T) if position_ids is None else np.asarray(position_ids, np.int64)
        flat = [array for pair in past or () for array in pair]
        # Some graphs score the last position only, and some run several tokens behind a cache in
        # one row only: they read column by column.
        alone = self.file.scores == "last" or (self.file.cache == "shared" and P and B > 1)
        step = 1 if alone else max(T, 1)
        scores = []
        for begin in range(0, T, step):
            end = min(begin + step, T)
            part = slice(begin, end)
            logits, flat = self._session.run(ids[:, part], real[:, : P + end], order[:, part], flat)
            scores.append(logits)
        arrays = [value if isinstance(value, np.ndarray) else value.numpy() for value in flat]
        whole = scores[0] if len(scores) == 1 else np.concatenate(scores, axis=1)
        return whole, list(zip(arrays[::2], arrays[1::2], strict=True))

    def new_cache(self, rows: int = 1) -> Cache:
        """An empty cache of so many rows: `read`, `step`, `rewind`, `branch`, `save` it."""
        if not self.config["causal"]:
            kind = "a masked language model" if self.config["labels"] is None else "a classifier"
            raise UserError(
                f"{self._folder}: is {kind} without a cache, it cannot generate; "
                f"export a causal model"
            )
        made = GrowingCache if self.file.cache == "growing" else SharedCache
        return made(self._session, rows, self.block_size, self._identify)

    def load_cache(self, path: Path | str) -> Cache:
        """A cache that was saved with the same folder and precision.

        Raises:
            UserError: there is no such file, or another model made it.
            CheckFailed: it is broken.
        """
        expected = cache_file.Expected(
            identity=self._identify(),
            names=self._session.past,
            shape=self._session.cache_shape,
            dtype=np.dtype(self._session.cache_dtype).name,
            capacity=self.block_size,
            vocab_size=self.vocab_size,
            right=self.file.padding == "right",
        )
        saved = cache_file.read(Path(path), expected)
        loaded = self.new_cache(len(saved.ids))
        loaded.fill(saved.ids, saved.mask, saved.parts)
        return loaded

    def prefill(self, ids: Ints, mask: Bools) -> Floats:
        """Read ids (B, T), real where mask (B, T) is True; scores (B, V) behind the last of each.

        Whatever the cache held is forgotten, except for a cache that `complete` was given: of that
        the common beginning stays.
        """
        texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        if self._given is not None:
            self.cache = self._given
            return _read_on(self.cache, texts)
        if self._own is None or self._own.rows != len(texts):
            self._own = self.new_cache(len(texts))
        self.cache = self._own
        self.cache.rewind(0)
        return self.cache.read(texts)

    def decode(self, ids: Ints, mask: Bools) -> Floats:
        """Read one more column, ids (B, 1), of the rows whose last mask is True; scores (B, V)."""
        cache, live = self.cache, mask[:, -1]
        assert cache is not None
        if cache.columns < cache.capacity or cache.packed:
            return cache.step(ids[:, 0], live)
        # A given cache may hold more padding than the loop knows of.
        known = cache.tokens
        cache.rewind(0)
        return cache.read(
            [
                [*known[row], int(id_)] if live[row] else [int(id_)]
                for row, id_ in enumerate(ids[:, 0])
            ]
        )

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
        cache: Cache | None = None,
    ) -> Completion:
        """Continue a batch of prompts; see gptopt.runtime.generation.complete.

        Args:
            prompts: token ids of each.
            sampling: filters, seed and number of new tokens.
            context: what happens where the context is full.
            end_ids: replaces the folder's own end-of-text ids; () never ends a text early.
            on_text: called with the row and each piece of text.
            on_token: called with the row and each token.
            cache: of this model, a row for each prompt. What it has in common with the beginning
                of the prompts is not read again; afterwards it holds what was generated too.

        Raises:
            UserError: see gptopt.runtime.generation.complete; or the cache does not fit.
        """
        if cache is None and not self.config["causal"]:
            self.new_cache()  # says why not
        if cache is not None and cache.session is not self._session:
            raise UserError("the cache is of another model; save it there and load_cache it here")
        if cache is not None and cache.rows != len(prompts):
            raise UserError(
                f"the cache has {cache.rows} rows, {len(prompts)} prompts were given; branch it"
            )
        self._given = cache
        try:
            return complete(
                self,
                prompts,
                sampling,
                tokenizer=self.tokenizer,
                end_ids=self.end_ids if end_ids is None else end_ids,
                context=context,
                on_text=on_text,
                on_token=on_token,
            )
        finally:
            self._given = None

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        context: Context = "error",
        on_token: OnToken | None = None,
        *,
        end_ids: Sequence[int] | None = None,
        cache: Cache | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, the one that ended the text included."""
        done = self.complete(
            prompt_ids, sampling, context=context, end_ids=end_ids, on_token=on_token, cache=cache
        )
        return [row.tokens for row in done.rows]

    def _identify(self) -> str:
        """sha256 of the ONNX file and its data, and of the adapter; taken when first needed."""
        if not self._identity:
            data = self._path.with_name(self._path.name + "_data")
            parts = [sha256_of(path) for path in (self._path, data) if path.is_file()]
            self._identity = hashlib.sha256("".join(parts).encode()).hexdigest()
        if self.adapter is None:
            return self._identity
        file = adapter_file(self.adapter, self._session.slots.dtype)
        return f"{self._identity} {sha256_of(self._folder / file)}"


def _read_on(cache: Cache, texts: list[list[int]]) -> Floats:
    """Read texts into a cache, as little of them as it does not hold yet."""
    common = [_common(known, text[:-1]) for known, text in zip(cache.tokens, texts, strict=True)]
    longest = max(len(text) - kept for text, kept in zip(texts, common, strict=True))
    cache.rewind(common)
    if cache.columns + longest > cache.capacity:  # padding between old and new has no room
        common = [0] * len(texts)
        cache.rewind(0)
    return cache.read([text[kept:] for text, kept in zip(texts, common, strict=True)])


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
