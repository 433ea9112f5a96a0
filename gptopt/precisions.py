"""The precisions that weights are exported in, for those who train towards one."""

from gptopt.export.precisions import PRECISIONS, BlockFormat, ChannelFormat, Precision

__all__ = ["PRECISIONS", "BlockFormat", "ChannelFormat", "Precision"]
