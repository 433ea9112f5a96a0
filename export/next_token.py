"""An optional output that is the next token itself, so that no client copies or sorts the scores.

"greedy" takes the likeliest token of each row. "sample" draws one: of the top_k likeliest, those
whose mass reaches top_p, at a temperature; all four numbers, seed among them, are inputs with
defaults. The draw adds noise to the scores and takes the largest sum (Gumbel 1954; the trick is in
Maddison et al. 2014, arXiv:1411.0030). The noise is counted, not drawn from a state: it depends on
the seed, the row, the position and the token alone, in integers, so that every client and every
form of the cache draws the same. Filters are those of gptopt.runtime.sampling, save that top_k
keeps exactly so many where scores are equal.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gptopt.export.contract import BATCH, NEXT, SAMPLING
from gptopt.export.notes import Notes

STAGE = "next token"
Tokens = Literal["none", "greedy", "sample"]

_U64 = npt.NDArray[np.uint64]
_KEY = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, as of Weyl sequences
_ROUNDS = 3
_HALF = 1 << 32
_BITS = 24  # of a uniform number: what float32 holds exactly
_COLDEST = 1e-6  # temperature of the mass that top_p counts, where the temperature is 0
_LOWEST = float(np.finfo(np.float32).min)


def add_next_token(model: ir.Model, tokens: Tokens, size: int | None, notes: Notes) -> ir.Model:
    """A copy of a graph with the output next_tokens (B, 1), that of each row's last real token.

    Args:
        model: a finished causal graph.
        tokens: how it is chosen.
        size: ids that may be chosen, those of the tokenizer; None: all.
        notes: receives what was done.
    """
    copy = model.clone()
    graph = _Writer(copy.graph)
    scores, position = _last_scores(graph, size)
    chosen = (
        graph("ArgMax", scores, axis=2, keepdims=0)
        if tokens == "greedy"
        else _sample(graph, scores, position)
    )
    chosen.name = NEXT
    chosen.shape, chosen.type = ir.Shape([BATCH, None]), ir.TensorType(ir.DataType.INT64)
    copy.graph.outputs.append(chosen)
    notes.add(STAGE, NEXT, tokens, "asked for with --tokens")
    return copy


class _Writer:
    """Appends nodes to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {value.name: value for value in graph.inputs}
        self._count = 0

    def __call__(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """The outputs of a new node; numbers among its inputs become constants."""
        values = [each if isinstance(each, ir.Value) else self._constant(each) for each in inputs]
        node = ir.node(kind, values, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = self._name(kind)
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def option(self, name: str, default: Any) -> ir.Value:
        """An input (1,) that clients may leave out."""
        value = self._constant(default, name)
        self.graph.inputs.append(value)
        return value

    def _constant(self, number: Any, name: str | None = None) -> ir.Value:
        array = np.asarray(number)
        name = name or self._name("constant")
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self.graph.register_initializer(value)
        return value

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{NEXT}.{kind.lower()}.{self._count}"


def _ints(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def _last_scores(graph: _Writer, size: int | None) -> tuple[ir.Value, ir.Value]:
    """Scores (B, n, V) and position (B, n) of each row's last real token, n = 1.

    n is 0 where no position is scored. Where only the last ones are, a row that ends in padding has
    no scores of its own: what is chosen for it says nothing.
    """
    logits = graph.graph.outputs[0]
    mask, ids = graph.inputs["attention_mask"], graph.inputs["input_ids"]
    T, S = graph("Shape", ids, start=1, end=2), graph("Shape", mask, start=1, end=2)
    N = graph("Shape", logits, start=1, end=2)
    new = graph("Slice", mask, graph("Sub", S, T), S, _ints(1))
    new = graph("Cast", new, to=int(ir.DataType.FLOAT))
    last = graph("ArgMax", new, axis=1, keepdims=1, select_last_index=1)  # (B, 1)
    last = graph("Slice", last, _ints(0), N, _ints(1))
    position = graph("GatherElements", graph.inputs["position_ids"], last, axis=1)
    scored = graph("Max", graph("Sub", last, graph("Sub", T, N)), _ints(0))
    scores = graph("GatherND", logits, graph("Unsqueeze", scored, _ints(2)), batch_dims=1)
    V = logits.shape[2] if logits.shape is not None else None
    if size is not None and size != V:
        scores = graph("Slice", scores, _ints(0), _ints(size), _ints(2))
    return scores, position


def _sample(graph: _Writer, scores: ir.Value, position: ir.Value) -> ir.Value:
    """Draw a token (B, n) from scores (B, n, V)."""
    seed, temperature, top_k, top_p = (graph.option(name, each) for name, each in SAMPLING.items())
    V = graph("Shape", scores, start=2, end=3)
    k = graph("Where", graph("Less", top_k, _ints(1)), V, graph("Min", top_k, V))
    scores, tokens = graph("TopK", scores, k, outputs=2, axis=-1)  # (B, n, k), largest first
    scores = graph("Sub", scores, graph("Slice", scores, _ints(0), _ints(1), _ints(2)))
    mass = graph("Div", scores, graph("Max", temperature, np.array([_COLDEST], np.float32)))
    mass = graph("Softmax", mass, axis=-1)
    before = graph("CumSum", mass, np.array(2, np.int64), exclusive=1)
    noise = _gumbel(graph, _counted(graph, seed, position, tokens))
    scores = graph("Add", scores, graph("Mul", noise, temperature))
    scores = graph("Where", graph("Less", before, top_p), scores, np.float32(_LOWEST))
    best = graph("ArgMax", scores, axis=2, keepdims=1)
    chosen: ir.Value = graph("Squeeze", graph("GatherElements", tokens, best, axis=2), _ints(2))
    return chosen


def _counted(graph: _Writer, seed: Any, position: Any, tokens: Any) -> Any:
    """24 random bits (B, n, k) as float32; `noise_of` says the same in numpy."""
    B = graph("Squeeze", graph("Shape", tokens, start=0, end=1))
    row = graph("Range", np.array(0, np.int64), B, np.array(1, np.int64))
    row = graph("Unsqueeze", row, _ints(1))  # (B, 1)

    def unsigned(value: Any) -> Any:
        return graph("Cast", value, to=int(ir.DataType.UINT64))

    def times(value: Any, factor: int) -> Any:
        return graph("Mul", value, np.uint64(factor))

    def mix(counter: Any) -> Any:
        x = even = times(counter, _KEY)
        odd = graph("Add", even, np.uint64(_KEY))
        for turn in range(_ROUNDS):
            x = graph("Add", graph("Mul", x, x), odd if turn % 2 else even)
            x = graph("Add", times(x, _HALF), graph("Div", x, np.uint64(_HALF)))
        return x

    place = graph("Add", times(unsigned(row), _HALF), unsigned(position))  # (B, n)
    stream = mix(graph("Add", mix(unsigned(seed)), place))
    stream = graph("Unsqueeze", stream, _ints(2))
    bits = mix(graph("Add", stream, unsigned(tokens)))
    bits = graph("Div", bits, np.uint64(1 << (64 - _BITS)))
    return graph("Cast", bits, to=int(ir.DataType.FLOAT))


def _gumbel(graph: _Writer, bits: Any) -> Any:
    """-log(-log(u)) of u in the middle of its interval, never 0 or 1."""
    u = graph("Mul", graph("Add", bits, np.float32(0.5)), np.float32(2.0**-_BITS))
    # -log(u) of a u next to 1 would be all rounding: there it is 1 - u.
    far = graph("Neg", graph("Log", u))
    near = graph("Mul", graph("Sub", np.float32(2.0**_BITS - 0.5), bits), np.float32(2.0**-_BITS))
    close = graph("Less", near, np.float32(2.0**-12))
    return graph("Neg", graph("Log", graph("Where", close, near, far)))


def noise_of(
    seed: int, row: npt.ArrayLike, position: npt.ArrayLike, token: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """The noise that a graph adds to the scores of tokens, broadcast over its arguments."""
    rows, places, tokens = (np.asarray(each).astype(np.uint64) for each in (row, position, token))
    with np.errstate(over="ignore"):
        stream = _mix(np.array([seed]).astype(np.uint64))
        stream = _mix(stream + rows * np.uint64(_HALF) + places)
        stream = _mix(stream + tokens)
    bits = (stream // np.uint64(1 << (64 - _BITS))).astype(np.float32)
    u, near = (bits + 0.5) * 2.0**-_BITS, (2.0**_BITS - 0.5 - bits) * 2.0**-_BITS
    noise: npt.NDArray[np.float32] = -np.log(np.where(near < 2.0**-12, near, -np.log(u)))
    return noise.astype(np.float32)


def _mix(counter: _U64) -> _U64:
    """Squares and half turns of a counter: Widynski 2020, arXiv:2004.06278, with one key."""
    x = even = counter * np.uint64(_KEY)
    odd = even + np.uint64(_KEY)
    for turn in range(_ROUNDS):
        x = x * x + (odd if turn % 2 else even)
        x = x * np.uint64(_HALF) + x // np.uint64(_HALF)
    return x
