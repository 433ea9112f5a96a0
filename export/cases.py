"""The ways in which clients use a graph, each as a short play for the proof.

A case feeds tokens in its own way; whatever it does, each row's logits must be those of the plain
model on that row's real tokens alone. Padding holds random tokens, so that a leak shows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from gptopt.export.stream import Claim, Ids, Runner, Stream, as_ids

_SEED = 20
LONGEST = 160  # tokens that a cache of any case but the context edge has to hold
_KEEP = 8  # positions that are compared at the end of a long context
# Parameters times tokens of the longest text that is computed in float64: seconds on two cores.
_LONGEST_WORK = 2e11


@dataclass(frozen=True, slots=True)
class Stage:
    """What a case plays with."""

    graph: Runner  # the cache in the form that the runtime of this project uses
    whole: Runner  # the same with room for the model's whole context
    growing: Runner
    padding: str  # "any" or "right"
    by_column: bool  # see Stream
    keeps: bool  # it scores only the last positions where it is asked to
    causal: bool
    vocab_size: int
    block_size: int
    parameters: int
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(_SEED))

    def stream(self, rows: int = 1, growing: bool = False) -> Stream:
        """A fresh stream."""
        return Stream(self.growing if growing else self.graph, rows, by_column=self.by_column)

    def draw(self, rows: int, length: int) -> Ids:
        """Random tokens (rows, length)."""
        return self.random.integers(0, self.vocab_size, (rows, length))

    def fit(self, length: int) -> int:
        """`length`, or less where the context is shorter."""
        return max(1, min(length, self.block_size))


Case = Callable[[Stage], Iterator[Stream]]


def prefill(stage: Stage) -> Iterator[Stream]:
    """Whole texts of several lengths, one of a single token."""
    for length in sorted({stage.fit(length) for length in (1, 2, 17, 64)}):
        stream = stage.stream()
        stream.feed(stage.draw(1, length))
        yield stream


def batch(stage: Stage) -> Iterator[Stream]:
    """Three texts of one length at once."""
    stream = stage.stream(3)
    stream.feed(stage.draw(3, stage.fit(9)))
    yield stream


def decode(stage: Stage) -> Iterator[Stream]:
    """A short prompt, then token by token."""
    stream = stage.stream()
    for length in _parts(stage.fit(24), (5,)):
        stream.feed(stage.draw(1, length))
    yield stream


def decode_from_one(stage: Stage) -> Iterator[Stream]:
    """Token by token from the first token on, two texts at once."""
    stream = stage.stream(2)
    for _ in range(stage.fit(6)):
        stream.feed(stage.draw(2, 1))
    yield stream


def chunked_prefill(stage: Stage) -> Iterator[Stream]:
    """A long prompt in pieces of uneven length."""
    stream = stage.stream()
    for length in _parts(stage.fit(32), (7, 1, 12, 2, 9)):
        stream.feed(stage.draw(1, length))
    yield stream


def left_padding(stage: Stage) -> Iterator[Stream]:
    """Prompts of different lengths, padded on the left, then decoded together."""
    yield _padded(stage, left=True)


def right_padding(stage: Stage) -> Iterator[Stream]:
    """Prompts of different lengths, padded on the right, then decoded together."""
    yield _padded(stage, left=False)


def growing_cache(stage: Stage) -> Iterator[Stream]:
    """What could share a buffer, run by a client that makes a longer cache every time."""
    stream = stage.stream(growing=True)
    for length in _parts(stage.fit(9), (3, 2)):
        stream.feed(stage.draw(1, length))
    yield stream
    yield _padded(stage, left=stage.padding == "any", growing=True)


def last_scores(stage: Stage) -> Iterator[Stream]:
    """Only the last positions scored, of a prompt and of single tokens."""
    stream = stage.stream(2)
    stream.feed(stage.draw(2, stage.fit(9)), scores=1)
    for _ in range(min(2, stage.block_size - stage.fit(9))):
        stream.feed(stage.draw(2, 1), scores=1)
    yield stream
    stream = stage.stream()
    stream.feed(stage.draw(1, stage.fit(7)), scores=stage.fit(3))
    yield stream


def beam_reorder(stage: Stage) -> Iterator[Stream]:
    """Rows of the cache permuted and repeated between steps."""
    stream = stage.stream(3)
    for length, order in zip(_parts(stage.fit(8), (4,)), ([2, 0, 0], [1, 1, 2]) * 4, strict=False):
        stream.feed(stage.draw(3, length))
        stream.reorder(order)
    yield stream


def rewind(stage: Stage) -> Iterator[Stream]:
    """The cache cut back, then another continuation, in one piece and by token."""
    stream = stage.stream(2)
    length = stage.fit(12)
    stream.feed(stage.draw(2, length))
    stream.rewind(length // 2)
    for part in _parts(length - length // 2, (3,)):
        stream.feed(stage.draw(2, part))
    yield stream


def context_edge(stage: Stage) -> Iterator[Stream]:
    """The last positions that the model has.

    Where a text of block_size tokens would take too long to compute in float64, a short text stands
    at the last positions.
    """
    length, offset = stage.block_size, 0
    if stage.parameters * length > _LONGEST_WORK:
        length = stage.fit(16)
        offset = stage.block_size - length
    stream = Stream(stage.whole, 1, offset)
    if stage.causal:
        for part in _parts(length, (max(1, length - 3),)):
            scores = min(part, _KEEP) if stage.keeps else 0  # the others cost a third of the time
            stream.feed(stage.draw(1, part), keep=_KEEP, scores=scores)
    else:
        stream.feed(stage.draw(1, length), keep=_KEEP)
    yield stream


def greedy(stage: Stage, tokens: int) -> Stream:
    """A prompt continued with the likeliest token, `tokens` times."""
    stream = stage.stream()
    logits = stream.feed(stage.draw(1, stage.fit(4)))
    for _ in range(tokens - 1):
        best = int(logits[0, -1, : stage.vocab_size].argmax())
        logits = stream.feed(as_ids([[best]]))
    return stream


CACHED: dict[str, Case] = {
    "prefill": prefill,
    "batch": batch,
    "decode": decode,
    "decode from one token": decode_from_one,
    "chunked prefill": chunked_prefill,
    "left padding": left_padding,
    "right padding": right_padding,
    "beam reorder": beam_reorder,
    "rewind": rewind,
    "context edge": context_edge,
}
UNCACHED = {
    name: CACHED[name] for name in ("prefill", "batch", "left padding", "right padding",
                                    "context edge")
}  # fmt: skip


def claims_of(case: Case, name: str, stage: Stage) -> list[Claim]:
    """Play a case; its tokens depend on its name alone, so that all files play the same."""
    stage = dataclasses.replace(stage, random=np.random.default_rng([_SEED, *name.encode()]))
    return [claim for stream in case(stage) for claim in stream.claims]


def cases_of(stage: Stage) -> dict[str, Case]:
    """The cases that a file can be held to."""
    if not stage.causal:
        return UNCACHED
    cases = dict(CACHED)
    if stage.padding == "right":
        del cases["left padding"]
    if stage.graph.shared:
        cases["growing cache"] = growing_cache
    if stage.keeps:
        cases["last scores"] = last_scores
    return cases


def _padded(stage: Stage, *, left: bool, growing: bool = False) -> Stream:
    length = stage.fit(10)
    stream = stage.stream(3, growing=growing)
    column = np.arange(length)[::-1] if left else np.arange(length)
    sizes = as_ids([length, max(1, length - 3), 1])  # real tokens per row
    stream.feed(stage.draw(3, length), (column < sizes[:, None]).astype(np.int64))
    if stage.causal:
        for part in _parts(min(4, stage.block_size - length), (2,)):
            stream.feed(stage.draw(3, part))
    return stream


def _parts(total: int, first: tuple[int, ...]) -> list[int]:
    """Pieces of these lengths, then pieces of one, that add up to `total`."""
    parts: list[int] = []
    for length in first:
        if sum(parts) + length <= total:
            parts.append(length)
    return parts + [1] * (total - sum(parts))
