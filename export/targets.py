"""What a runtime can run, as data: the stages ask a target and know no runtime by name."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gptopt.errors import UserError
from gptopt.export.notes import Notes
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A family of runtimes that one exported folder is made for.

    Attributes:
        name: as it stands in report.json.
        opset: version of the standard operators; `Attention` with a cache needs 23.
        ir_version: version of the file format. onnx writes a newer one by default than
            onnxruntime reads, so it is always pinned.
        inline_limit_bytes: weights up to this size lie inside model.onnx, larger ones in
            model.onnx_data beside it, which runtimes map into memory instead of copying.
        attention: what the operator becomes: com.microsoft.GroupQueryAttention, the standard
            Attention (with "scatter" TensorScatter writes the cache), or nothing newer than MatMul
            and Softmax.
        operators: whether rmsnorm, rotary and gelu take the standard operators of their opset,
            the com.microsoft ones, or primitives.
        rules: fusions that follow, names of gptopt.export.rules.
        precisions: what `--precision` may ask for.
        provider: onnxruntime's name of the provider whose kernels must cover every node.
        largest_bytes: what one file may have, its weights beside it included, to be loaded at all.
        lookups: whether rows of quantised tables come from com.microsoft.GatherBlockQuantized.
        softcap: whether every kernel of GroupQueryAttention caps scores where it is told to.
        angles: whether cosines and sines of positions are computed, or looked up.
        cache: "shared": a runtime may bind one buffer as past and present, longer than the text;
            "static": it must.
        padding: "right": the cache holds no padding, a row's next token overwrites it, so prompts
            may be padded on the right only. "any": padding stays where it is and is masked.
    """

    name: str
    opset: int
    ir_version: int = 10
    inline_limit_bytes: int = 256 * _MIB
    attention: Literal["gqa", "scatter", "standard", "primitives"]
    operators: Literal["standard", "microsoft", "primitives"]
    rules: tuple[str, ...] = ()
    precisions: tuple[str, ...]
    provider: str = "CPUExecutionProvider"
    largest_bytes: int | None = None
    lookups: Literal["microsoft", "primitives"] = "microsoft"
    softcap: bool = True
    angles: Literal["computed", "tables"] = "computed"
    cache: Literal["shared", "static", "growing"] = "growing"
    padding: Literal["any", "right"] = "any"

    def facts(self, file: str, cache_dtype: str = "float32") -> EdgeFile:
        """What the runtime is told of a file that was made for this target."""
        return EdgeFile(file=file, cache=self.cache, cache_dtype=cache_dtype, padding=self.padding)

    def growing(self) -> "Target":
        """The same target for any model: the standard Attention, and a cache that grows."""
        rules = tuple(rule for rule in self.rules if rule not in _COMPACT)
        return replace(
            self, opset=max(self.opset, 23), attention="standard", rules=rules, cache="growing",
            padding="any",
        )  # fmt: skip


_FLOAT = ("fp32", "fp16")
_FUSED = ("skip_layernorm", "bias_gelu", "last_token")
_COMPACT = ("rotary_gqa", "packed_qkv")  # for a cache without padding

PORTABLE = Target(
    name="portable", opset=21, attention="gqa", operators="microsoft", rules=_FUSED,
    precisions=(*_FLOAT, "q8", "q4", "q4-fast", "q4f16", "q2"), cache="shared",
)  # fmt: skip
# Without skip_layernorm: onnxruntime's fused kernel is a plain loop on a CPU. Of (512, 768), one
# thread, it takes 1.73 ms, two Adds and a LayerNormalization 0.26 ms; of one row 3.8 and 1.5 us.
ORT_CPU = replace(
    PORTABLE, name="ort-cpu", rules=(*_COMPACT, "bias_gelu", "last_token"), padding="right",
    precisions=("fp32", "q8", "q4", "q4-fast", "q2"),
)  # fmt: skip
CUDA = "CUDAExecutionProvider"
ORT_CUDA = replace(
    ORT_CPU, name="ort-cuda", rules=(*_COMPACT, *_FUSED), provider=CUDA,
    precisions=("fp16", "q4f16"),
)  # fmt: skip
# WebAssembly addresses 4 GiB, and holds the weights twice: as they were read, and packed.
WEB = replace(
    PORTABLE, name="web", lookups="primitives", precisions=("fp32", "fp16", "q8", "q4", "q4f16"),
    softcap=False, angles="tables", largest_bytes=2**31,
)  # fmt: skip
STANDARD = Target(
    name="standard", opset=24, attention="scatter", operators="standard", rules=("last_token",),
    precisions=_FLOAT, cache="static",
)  # fmt: skip
# For runtimes that know no TensorScatter, and clients that let the cache grow.
GROWING = Target(
    name="standard-growing", opset=23, attention="standard", operators="standard", precisions=_FLOAT
)
LEGACY = Target(
    name="legacy", opset=17, ir_version=8, attention="primitives", operators="primitives",
    precisions=("fp32",),
)  # fmt: skip

_ALL = (PORTABLE, ORT_CPU, ORT_CUDA, WEB, STANDARD, GROWING, LEGACY)
TARGETS = {target.name: target for target in _ALL}


def find_targets(names: str) -> list[Target]:
    """The targets of a comma-separated list, each once.

    Raises:
        UserError: one of them is unknown, or there is none.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in TARGETS]
    if unknown or not wanted:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"--target: found {found}, expected one or more of {', '.join(TARGETS)}")
    return [TARGETS[name] for name in wanted]


def check_precisions(target: Target, precisions: Sequence[str]) -> None:
    """Raise UserError where the target has no form of a precision; says which targets have one."""
    for name in precisions:
        if name in target.precisions:
            continue
        able = [each.name for each in TARGETS.values() if name in each.precisions]
        others = f"; {name} runs with --target {' or '.join(able)}" if able else ""
        raise UserError(
            f"--precision {name}: --target {target.name} has {', '.join(target.precisions)}{others}"
        )


def tell_size(target: Target, path: Path, notes: Notes) -> None:
    """Warn, and note, where a file that was written is too large to be loaded."""
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    if target.largest_bytes is not None and size > target.largest_bytes:
        what = f"{size:,} bytes, too many for a browser"
        reason = f"--target {target.name} loads up to {target.largest_bytes:,}; choose fewer bits"
        logger.warning("%s: %s; %s", path.name, what, reason)
        notes.add("write", path.name, what, reason)
