"""A model this repository does not know, built from its operators: the same call exports it."""

import functools
import json
from typing import NamedTuple

import onnx_ir as ir
import pytest
import torch
from random_models import spread
from torch import Tensor, nn

from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.export import export_model, package, prove
from gptopt.export.targets import TARGETS
from gptopt.kernels import attention, ffn, layernorm, rotary
from gptopt.precisions import find_precisions

CONFIG = ModelConfig(
    n_layer=3, n_head=4, n_kv_head=2, n_embd=32, block_size=64, vocab_size=512, position="rotary"
)


class Output(NamedTuple):
    logits: Tensor
    present: list[tuple[Tensor, Tensor]] | None


class Parallel(nn.Module):
    """Attention and ffn side by side, reading one norm, as in GPT-J; half the channels rotate."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.norm = nn.Parameter(torch.ones(32))
        self.q = nn.Linear(32, 32, bias=False)
        self.k = nn.Linear(32, 16)
        self.v = nn.Linear(32, 16)
        self.proj = nn.Linear(32, 32)
        self.up = nn.Linear(32, 48)
        self.gate = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)
        self.sink = nn.Parameter(torch.zeros(4))

    def forward(self, x, mask, tables, past):
        B, T, _ = x.shape
        h, _ = layernorm(x, self.norm, None, kind="rms", eps=1e-6)
        q, k, v = (layer(h).view(B, T, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = rotary(q, k, *tables)
        out, present, lse = attention(
            q, k, v, past=past, key_mask=mask, window=self.window, softcap=30.0, scale=0.25
        )
        # An attention sink: a head may attend to nothing. It needs the log-sum-exp.
        out = out * torch.sigmoid(lse - self.sink[:, None])[..., None]
        out = self.proj(out.transpose(1, 2).reshape(B, T, 32))
        hidden = ffn(
            h, self.up.weight, self.up.bias, activation="swiglu", gate_weight=self.gate.weight
        )
        return x + out + self.down(hidden), present


class Model(nn.Module):
    """Windows alternate from layer to layer, and the logits have a bias of their own."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG
        self.wte = nn.Embedding(512, 32)
        self.blocks = nn.ModuleList(Parallel(window) for window in (None, 6, None))
        self.head = nn.Linear(32, 512)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))

    def forward(self, ids, *, attention_mask=None, position_ids=None, past=None, use_cache=False):
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1])[None]
        mask = None if attention_mask is None else attention_mask.bool()
        angles = position_ids[..., None] * self.frequencies
        x, present = self.wte(ids), []
        for i, block in enumerate(self.blocks):
            x, cache = block(
                x, mask, (angles.cos(), angles.sin()), None if past is None else past[i]
            )
            present.append(cache)
        return Output(self.head(x), present if use_cache else None)


@pytest.fixture(scope="module")
def model():
    return spread(Model(), seed=3)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "edge"
    return folder, export_model(model, None, folder)


def test_it_exports_proves_and_would_fail_without_a_block(model, exported, tmp_path):
    folder, report = exported
    assert report["passed"]
    assert len(report["cases"]) == 12
    assert report["greedy"]["agreeing"] == report["greedy"]["tokens"] == 61
    path = folder / "onnx" / "model.onnx"
    for i in range(3):
        graph = ir.load(path)
        for layer in ("proj", "down"):
            weight = graph.graph.initializers[f"blocks.{i}.{layer}.weight"]
            weight.const_value = ir.tensor(0 * weight.const_value.numpy())
        ir.save(graph, tmp_path / "model.onnx")
        assert not prove(tmp_path / "model.onnx", model, cases=["prefill"]).passed
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 2)


def test_layers_with_equal_windows_share_a_mask(exported):
    graph = ir.load(exported[0] / "onnx" / "model.onnx").graph
    masks = [node.inputs[3] for node in graph if node.op_type == "Attention"]
    assert masks[0] is masks[2]
    assert masks[0] is not masks[1]


class Wrong(Model):
    """Forward passes that cannot become a graph."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, ids, **keywords):
        output = super().forward(ids, **keywords)
        if self.fault == "values" and int(ids.sum()) > 3:
            return output
        if self.fault == "cache":
            return Output(output.logits, output.present and output.present[:-1])
        if self.fault == "operation":
            return Output(torch.linalg.svd(output.logits).U, output.present)
        return output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("values", "cannot record it"),
        ("operation", "cannot be written as ONNX"),
        ("cache", r"has \d outputs, its config asks for 7: scores, and"),
    ],
)
def test_what_cannot_be_a_graph_is_one_line(fault, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export_model(spread(Wrong(fault)), None, tmp_path / "edge")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_sizes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Linear.config: expected a gptopt ModelConfig"):
        export_model(nn.Linear(2, 2).eval(), None, tmp_path / "edge")


def test_training_mode_and_other_precisions_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"training mode; call model.eval\(\)"):
        export_model(Model().train(), None, tmp_path / "edge")
    with pytest.raises(UserError, match=r"torch.float64, the export takes float32"):
        export_model(Model().double().eval(), None, tmp_path / "edge")


class Small(nn.Module):
    """The example of the README: one layer, written by a user, of gptopt's operators."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=96)
        self.wte = nn.Embedding(96, 32)
        self.wpe = nn.Embedding(32, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 96, bias=False)

    def forward(self, ids, *, attention_mask=None, position_ids=None, past=None, use_cache=False):
        B, T = ids.shape
        if position_ids is None:
            position_ids = torch.arange(T)[None]
        x = self.wte(ids) + self.wpe(position_ids)
        h, _ = layernorm(x, self.norm.weight, self.norm.bias, eps=1e-5)
        q, k, v = self.qkv(h).view(B, T, 3, 2, 16).permute(2, 0, 3, 1, 4)
        mask = None if attention_mask is None else attention_mask.bool()
        out, present, _ = attention(
            q, k, v, past=None if past is None else past[0], key_mask=mask, need_lse=False
        )
        x = x + out.transpose(1, 2).reshape(B, T, 32)
        x = x + self.down(ffn(x, self.up.weight, self.up.bias, activation="gelu"))
        return Output(self.head(x), [present] if use_cache else None)


@pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.name != "ort-cuda"], ids=lambda t: t.name
)
def test_it_exports_for_every_target_in_every_precision(target, tmp_path, monkeypatch):
    short = functools.partial(package.prove, cases=["prefill", "decode", "right padding"])
    monkeypatch.setattr(package, "prove", short)
    plan = package.Plan(find_precisions(",".join(target.precisions)))
    report = export_model(spread(Small()), None, tmp_path / "edge", target=target, plan=plan)
    assert list(report["variants"]) == list(target.precisions)
    assert all(variant["passed"] for variant in report["variants"].values())
