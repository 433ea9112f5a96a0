"""The operators a GPT spends its time in: one meaning each, and a body for each place it runs.

    attention  attention_decode  layernorm  ffn  cross_entropy  rotary

`kernels/<op>/reference.py` says what an operator means, in plain PyTorch. While torch.export
traces, each operator stays whole as `torch.ops.gptopt.<op>`; otherwise the reference body is plain
PyTorch, which torch.compile can fuse. `explain` tells which body `impl="auto"` runs.

One alphabet for every shape:

    B batch                T tokens of a call      P tokens before it
    S keys, P + T          M size of a cache       C channels (n_embd)
    H query heads          K key/value heads       D channels of a head
    F width of the ffn     V vocabulary            R rotated pairs of a head
"""

from gptopt.kernels.attention import AttentionOutput, StaticCache, attention, attention_decode
from gptopt.kernels.cross_entropy import cross_entropy
from gptopt.kernels.ffn import ffn
from gptopt.kernels.layernorm import layernorm
from gptopt.kernels.philox import dropout
from gptopt.kernels.rotary import rotary
from gptopt.kernels.select import OPERATORS, Impl, KernelUnavailable, explain

__all__ = [
    "OPERATORS",
    "AttentionOutput",
    "Impl",
    "KernelUnavailable",
    "StaticCache",
    "attention",
    "attention_decode",
    "cross_entropy",
    "dropout",
    "explain",
    "ffn",
    "layernorm",
    "rotary",
]
