"""In how many bits a graph keeps its numbers, as data: the stages ask a precision by its fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gptopt.errors import UserError
from gptopt.kernels.quantization import BLOCKS, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """Weights in 8, 4 or 2 bits, a scale per block of a row: MatMulNBits, GatherBlockQuantized.

    Attributes:
        bits: 8, 4 or 2.
        block: elements that share a scale. A table that is also read by rows (an embedding) takes
            the largest block up to this one that divides its width.
        symmetric: no zero points are stored.
        method: "gptq" needs a calibration text and is "search" without one.
    """

    bits: int
    block: int
    symmetric: bool = True
    method: Method = "search"

    def fitted(self, width: int, *, looked_up: bool) -> "BlockFormat | None":
        """The format of a matrix with rows this wide.

        One that is only multiplied takes the first block that holds a narrow row; rows that are
        looked up need a block that divides them, and have no format where there is none.
        """
        if looked_up:
            divides = [block for block in BLOCKS if block <= self.block and width % block == 0]
            return replace(self, block=max(divides)) if divides else None
        narrow = min(self.block, *(block for block in BLOCKS if block >= width), BLOCKS[-1])
        return replace(self, block=narrow)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelFormat:
    """Weights in int8, a scale per output; inputs become int8 as they come: DynamicQuantizeMatMul.

    Their range is found per call over all its tokens, so what a prompt says depends, a little, on
    how it is cut. The fastest form for long prompts.
    """


Format = BlockFormat | ChannelFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """What a precision may cost on held-out text (quality.py); None: anything.

    Attributes:
        perplexity: by what part it may exceed the PyTorch model's.
        mean_kl: mean Kullback-Leibler divergence from the model, nats per token.
        agreement: at least this share of the likeliest tokens is the model's.
    """

    perplexity: float | None = None
    mean_kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """One file of an exported folder.

    Attributes:
        name: as `--precision` takes it.
        suffix: what stands behind `model` in the file's name, as transformers.js looks for it.
        layers: format of the linear layers' weights, None as they are.
        head: format of the head and of the token embedding, which share their bytes where the
            head is tied. Always blocks, or None.
        overrides: weight name -> format, where a layer differs from `layers`.
        floats: type of everything that is not quantised.
        allowed: what it may lose on held-out text.
    """

    name: str
    suffix: str
    layers: Format | None = None
    head: BlockFormat | None = None
    overrides: Mapping[str, Format | None] = field(default_factory=dict)
    floats: Literal["float32", "float16"] = "float32"
    allowed: Allowed = Allowed()

    def __post_init__(self) -> None:
        """Refuse what no kernel computes."""
        formats = (self.layers, *self.overrides.values())
        if self.floats == "float16" and any(isinstance(f, ChannelFormat) for f in formats):
            raise ValueError(f"{self.name}: dynamic int8 products read and write float32 only")

    @property
    def quantized(self) -> bool:
        """Whether any weight is kept in less than its floats."""
        return self.layers is not None or self.head is not None or bool(self.overrides)

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text makes a difference."""
        formats = (self.layers, self.head, *self.overrides.values())
        return any(isinstance(each, BlockFormat) and each.method != "nearest" for each in formats)


_Q4 = BlockFormat(bits=4, block=64, method="gptq")
# The table is as large as seven layers of a GPT-2, and its errors are seen twice.
_Q4_HEAD = BlockFormat(bits=4, block=32, symmetric=False, method="gptq")
_WIDE = BlockFormat(bits=4, block=128, method="gptq")
# Errors of the first block's queries, keys and values go through everything behind them: in four
# bits they were more of what a trained model lost than all its other layers together
# (bench/results/quality.json measures the files).
_FIRST: Mapping[str, Format | None] = {
    "blocks.0.attn.qkv.weight": BlockFormat(bits=8, block=128, method="gptq")
}

# Tens of times what a small, briefly trained model loses (bench/results/quality.json): the longer
# a model is trained, the more it loses. Not a grade, but a limit beyond which something is wrong.
_EXACT = Allowed(perplexity=1e-4, mean_kl=1e-6, agreement=0.999)
_HALF = Allowed(perplexity=2e-3, mean_kl=2e-4, agreement=0.98)
_EIGHT = Allowed(perplexity=0.01, mean_kl=0.005, agreement=0.95)
_FOUR = Allowed(perplexity=0.05, mean_kl=0.05, agreement=0.85)
_TWO = Allowed(perplexity=1.0, mean_kl=1.0, agreement=0.4)

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", suffix="", allowed=_EXACT),
        Precision(name="fp16", suffix="_fp16", floats="float16", allowed=_HALF),
        Precision(
            name="q8", suffix="_quantized", layers=ChannelFormat(),
            head=BlockFormat(bits=8, block=128), allowed=_EIGHT,
        ),
        Precision(
            name="q4", suffix="_q4", layers=_Q4, head=_Q4_HEAD, overrides=_FIRST, allowed=_FOUR
        ),
        Precision(
            name="q4-fast", suffix="_q4_fast", layers=_WIDE, head=_WIDE, allowed=_FOUR
        ),
        Precision(
            name="q4f16", suffix="_q4f16", layers=_Q4, head=_Q4_HEAD, overrides=_FIRST,
            floats="float16", allowed=_FOUR,
        ),
        Precision(
            name="q2", suffix="_q2",
            layers=BlockFormat(bits=2, block=32, symmetric=False, method="gptq"), head=_Q4_HEAD,
            overrides=_FIRST, allowed=_TWO,
        ),
    )
}  # fmt: skip


def allowed_of(name: str, cache_dtype: str | None) -> Allowed:
    """What a precision may lose on held-out text, with a cache of this type."""
    if name not in PRECISIONS:  # a file of somebody else's
        return Allowed()
    own = PRECISIONS[name].allowed
    return _EIGHT if cache_dtype == "int8" and own in (_EXACT, _HALF) else own


def find_precisions(names: str) -> list[Precision]:
    """The precisions of a comma-separated list, each once.

    Raises:
        UserError: one of them is unknown, or there is none.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if "bf16" in wanted:
        raise UserError(
            "--precision bf16: onnxruntime's CPU, on which every file is proven before it is "
            "written, has no MatMul or GroupQueryAttention in bfloat16; use fp16"
        )
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown or not wanted:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(
            f"--precision: found {found}, expected one or more of {', '.join(PRECISIONS)}"
        )
    return [PRECISIONS[name] for name in wanted]
