"""torch.export keeps every operator whole, whatever the sizes."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from gptopt.kernels import attention, cross_entropy, ffn, layernorm, rotary

# torch.export trips over its own deprecation where it takes a decomposed program apart.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

H, K, D, F, V = 4, 2, 8, 24, 13
C = H * D


class Block(nn.Module):
    """One of everything, as a model would call it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, (H + 2 * K) * D)
        self.up, self.gate, self.down = nn.Linear(C, F), nn.Linear(C, F), nn.Linear(F, C)
        self.register_buffer("slopes", torch.rand(H))

    def forward(self, x, mask, past_k, past_v, cos, sin):
        B, T, _ = x.shape
        y, _ = layernorm(x, self.norm.weight, self.norm.bias)
        heads = self.qkv(y).view(B, T, -1, D).transpose(1, 2)
        q, k, v = heads.split([H, K, K], dim=1)
        q, k = rotary(q, k, cos, sin)
        result = attention(
            q, k, v, past=(past_k, past_v), key_mask=mask != 0, alibi_slopes=self.slopes, window=6
        )
        y, x = layernorm(
            result.out.transpose(1, 2).reshape(B, T, C), self.norm.weight, None, x, kind="rms"
        )
        hidden = ffn(
            y,
            self.up.weight,
            self.up.bias,
            activation="swiglu",
            gate_weight=self.gate.weight,
            gate_bias=self.gate.bias,
        )
        return x + self.down(hidden), *result.present


def inputs(B, T, P):
    past = (torch.randn(B, K, P, D) for _ in range(2))
    tables = (torch.randn(1, T, D // 2) for _ in range(2))
    return torch.randn(B, T, C), torch.ones(B, P + T, dtype=torch.int64), *past, *tables


NAMED = [Dim(f"{name}_length" if name != "batch_size" else name)
         for name in ("batch_size", "sequence", "past_sequence", "total_sequence")]  # fmt: skip
OPERATORS = ["layernorm", "rotary", "attention", "layernorm", "ffn"]


@pytest.mark.parametrize(("strict", "dims"), [(False, NAMED), (True, [Dim.DYNAMIC] * 4)])
def test_operators_stay_whole_and_sizes_stay_free(strict, dims):
    batch, tokens, past, total = dims
    shapes = (
        {0: batch, 1: tokens},
        {0: batch, 1: total},
        {0: batch, 2: past},
        {0: batch, 2: past},
        {1: tokens},
        {1: tokens},
    )
    block = Block().eval()
    program = torch.export.export(block, inputs(2, 3, 5), dynamic_shapes=shapes, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if "gptopt" in str(n.target)]
    assert targets == [f"gptopt.{name}.default" for name in OPERATORS]
    text = str(program.graph)
    assert "softmax" not in text
    assert "layer_norm" not in text

    decomposed = program.run_decompositions()
    assert sum("gptopt" in str(n.target) for n in decomposed.graph.nodes) == len(OPERATORS)
    for sizes in ((2, 3, 5), (3, 4, 7), (4, 2, 2)):
        example = inputs(*sizes)
        for found in (program.module()(*example), decomposed.module()(*example)):
            for a, b in zip(found, block(*example), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_past_the_present_is_the_new_tokens():
    class First(nn.Module):
        def forward(self, q, k, v):
            result = attention(q, k, v, need_lse=False)
            return result.out, *result.present

    example = tuple(torch.randn(2, n, 3, D) for n in (H, K, K))
    dims = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    program = torch.export.export(First(), example, dynamic_shapes=(dims,) * 3)
    other = tuple(torch.randn(3, n, 5, D) for n in (H, K, K))
    for a, b in zip(program.module()(*other), First()(*other), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_and_the_impl_argument_are_whole_too():
    class Loss(nn.Module):
        def forward(self, hidden, head_weight, targets):
            y, _ = layernorm(hidden, None, None, impl="reference")
            return cross_entropy(y, head_weight, targets, impl="reference")

    example = (torch.randn(2, 3, C), torch.randn(V, C), torch.zeros(2, 3, dtype=torch.int64))
    program = torch.export.export(Loss(), example)
    targets = [str(n.target) for n in program.graph.nodes if "gptopt" in str(n.target)]
    assert targets == ["gptopt.layernorm.default", "gptopt.cross_entropy.default"]
    torch.testing.assert_close(program.module()(*example), Loss()(*example))
