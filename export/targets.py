"""What a runtime can run, as data: the stages ask a target and know no runtime by name."""

from dataclasses import dataclass


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
    """

    name: str
    opset: int
    ir_version: int
    inline_limit_bytes: int


STANDARD = Target(name="standard", opset=23, ir_version=10, inline_limit_bytes=256 * 2**20)
