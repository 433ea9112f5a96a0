"""A small exported folder made by hand with onnx.helper: no torch, and not the exporter's word.

Random untied weights with spread-out logits, so that greedy tokens vary and a wrong position, mask
or cache changes them.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gptopt.manifest import write_manifest


def build_graph(
    path: Path, *, n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=320,
    causal=True, seed=0, external=False, form="growing", scores="all", cache="float32",
) -> onnx.ModelProto:  # fmt: skip
    """Write a GPT-like ONNX graph to `path`: learned positions, one attention per layer, ffn.

    form: "growing" is the standard Attention; "any" and "right" are GroupQueryAttention, whose
    cache may be shared, with a bias from the mask, or for rows padded on the right only.
    scores: of all positions, of the "last" one, or as the optional input "keep" says.
    cache: float32, or int8 with GroupQueryAttention. The weights depend on the seed alone.
    """
    rng = np.random.default_rng(seed)
    C, H, D, V = n_embd, n_head, n_embd // n_head, vocab_size
    nodes, weights = [], []

    def weight(name, *shape, scale=1.0):
        value = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        weights.append(numpy_helper.from_array(value, name))
        return name

    def constant(name, value, dtype=np.int64):
        weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(op, inputs, output, **attributes):
        outputs = [output] if isinstance(output, str) else output
        nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **attributes))
        return output

    if form == "growing":
        _mask(node, constant, causal)
    else:
        _lengths(node, constant, form)
    node("Gather", [weight("wte", V, C), "input_ids"], "tokens")
    node("Gather", [weight("wpe", block_size, C), "position_ids"], "positions")
    x = node("Add", ["tokens", "positions"], "x0")
    inputs = [_info("attention_mask", ["batch_size", "total_sequence_length"], TensorProto.INT64)]
    kept = "sequence_length" if scores == "all" else "kept_length"
    outputs = [_info("logits", ["batch_size", kept, V])]
    for i in range(n_layer):
        h = _norm(node, weight, constant, x, f"l{i}.norm", C)
        for part in "qkv":
            node("MatMul", [h, weight(f"l{i}.w{part}", C, C, scale=C**-0.5)], f"l{i}.{part}")
        past, present = [], []
        if causal:
            past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
            present = [f"present.{i}.key", f"present.{i}.value"]
            kind = TensorProto.INT8 if cache == "int8" else TensorProto.FLOAT
            inputs += [_info(n, ["batch_size", H, "past_sequence_length", D], kind) for n in past]
            outputs += [
                _info(n, ["batch_size", H, "total_sequence_length", D], kind) for n in present
            ]
        qkv = [f"l{i}.q", f"l{i}.k", f"l{i}.v"]
        if form == "growing":
            node(
                "Attention", [*qkv, "mask", *past], [f"l{i}.a", *present],
                q_num_heads=H, kv_num_heads=H,
            )  # fmt: skip
        else:
            bias = "bias" if form == "any" else ""
            scale = constant("scale", np.float32([0.03]), np.float32) if i == 0 else "scale"
            scales, more = [], {}
            if cache == "int8":
                scales = ["", scale, scale]
                more = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
                more["kv_cache_bit_width"] = 8
            node(
                "GroupQueryAttention",
                [*qkv, *past, "seqlens", "total", "", "", "", bias, *scales], [f"l{i}.a", *present],
                num_heads=H, kv_num_heads=H, domain="com.microsoft", **more,
            )  # fmt: skip
        node("MatMul", [f"l{i}.a", weight(f"l{i}.wo", C, C, scale=C**-0.5)], f"l{i}.o")
        x = node("Add", [x, f"l{i}.o"], f"x{i}.attention")
        h = _norm(node, weight, constant, x, f"l{i}.norm2", C)
        node("MatMul", [h, weight(f"l{i}.up", C, 4 * C, scale=C**-0.5)], f"l{i}.f")
        node("Relu", [f"l{i}.f"], f"l{i}.r")
        node("MatMul", [f"l{i}.r", weight(f"l{i}.down", 4 * C, C, scale=C**-0.5)], f"l{i}.d")
        x = node("Add", [x, f"l{i}.d"], f"x{i + 1}")
    h = _norm(node, weight, constant, x, "norm", C)
    head = weight("head", C, V, scale=2 * C**-0.5)
    node("MatMul", [_kept(node, constant, weights, h, scores), head], "logits")
    if scores == "last":
        outputs[0] = _info("logits", ["batch_size", 1, V])
    ids = [_info(n, ["batch_size", "sequence_length"], TensorProto.INT64) for n in
           ("input_ids", "position_ids")]  # fmt: skip
    used = {name for made in nodes for name in made.input}
    weights = [weight for weight in weights if weight.name in used]
    if scores == "keep":
        inputs.append(_info("num_logits_to_keep", [1], TensorProto.INT64))
    graph = helper.make_graph(
        nodes, "gpt", [ids[0], inputs[0], ids[1], *inputs[1:]], outputs, weights
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=f"{path.name}_data",
        size_threshold=256,
    )
    return model


def _info(name, shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def _norm(node, weight, constant, x, name, channels):
    ones = constant(f"{name}.weight", np.ones(channels), np.float32)
    return node("LayerNormalization", [x, ones], name, axis=-1)


def _mask(node, constant, causal):
    """mask (B, 1, T, S): a query sees real keys up to its own index, and always itself."""
    zero, one = constant("zero", 0), constant("one", 1)
    node("Shape", ["attention_mask"], "S1", start=1, end=2)
    node("Shape", ["input_ids"], "T1", start=1, end=2)
    node("Squeeze", ["S1"], "S")
    node("Squeeze", ["T1"], "T")
    node("Sub", ["S", "T"], "P")
    node("Range", [zero, "S", one], "keys")
    node("Range", ["P", "S", one], "queries")
    node("Unsqueeze", ["queries", constant("axis1", [1])], "queries_column")  # (T, 1)
    node("Equal", ["queries_column", "keys"], "self")
    node("Cast", ["attention_mask"], "real2", to=TensorProto.BOOL)
    node("Unsqueeze", ["real2", constant("axes12", [1, 2])], "real")  # (B, 1, 1, S)
    if causal:
        node("LessOrEqual", ["keys", "queries_column"], "causal")
        node("And", ["real", "causal"], "seen")
    else:
        node("Or", ["real", "self"], "seen")
    node("Or", ["seen", "self"], "mask")


def _lengths(node, constant, form):
    """seqlens (B,) and total () of GroupQueryAttention, and bias (B, 1, T, S) for any padding."""
    zero, axes, most = (
        constant("zero", 0),
        constant("axes12", [1, 2]),
        constant("one32", 1, np.int32),
    )
    node("Shape", ["attention_mask"], "S1", start=1, end=2)
    node("Gather", ["S1", zero], "S")
    node("Cast", ["S"], "total", to=TensorProto.INT32)
    node("ReduceSum", ["attention_mask", constant("axis1", [1])], "counted", keepdims=0)
    if form == "right":
        node("Cast", ["counted"], "counted32", to=TensorProto.INT32)
        node("Sub", ["counted32", most], "seqlens")
        return
    node("Shape", ["counted"], "B1")
    node("Sub", ["total", most], "last")
    node("Expand", ["last", "B1"], "seqlens")
    node("Shape", ["input_ids"], "T1", start=1, end=2)
    node("Cast", ["attention_mask"], "real2", to=TensorProto.BOOL)
    node("Unsqueeze", ["real2", axes], "real")  # (B, 1, 1, S)
    node("Concat", ["B1", constant("one1", [1]), "T1", "S1"], "bias_shape", axis=0)
    node("Expand", ["real", "bias_shape"], "real4")
    low = constant("low", -1e9, np.float32)
    node("Where", ["real4", constant("none", 0, np.float32), low], "bias")


def _kept(node, constant, weights, h, scores):
    """The positions (B, T or 1, C) whose scores are made."""
    if scores == "all":
        return h
    begin = constant("minus_one", [-1])
    if scores == "keep":  # 0 keeps all: -0 is the first position
        weights.append(numpy_helper.from_array(np.asarray([0], np.int64), "num_logits_to_keep"))
        begin = node("Neg", ["num_logits_to_keep"], "begin")
    return node("Slice", [h, begin, constant("end", [2**31]), constant("axis_T", [1])], "kept")


def build_folder(
    folder: Path, tokenizer, *, tokenizer_size=None, external=False, manifest=True, files=None,
    **sizes,
) -> Path:  # fmt: skip
    """A complete exported folder around build_graph, with a manifest.

    files: precision -> arguments of build_graph for its file, told in config.json as an export
    does; none: one file and no facts about it.
    """
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "causal": True, **sizes}
    shape.setdefault("vocab_size", -(-tokenizer.size // 64) * 64)
    facts = {}
    for precision, more in (files or {"fp32": {}}).items():
        suffix = "" if precision == "fp32" else f"_{precision}"
        name = f"onnx/model{suffix}.onnx"
        build_graph(folder / name, external=external, **shape, **more)
        form = more.get("form", "growing")
        facts[precision] = {
            "file": name,
            "cache": "growing" if form == "growing" else "shared",
            "cache_dtype": more.get("cache", "float32"),
            "padding": "right" if form == "right" else "any",
            "scores": "last" if more.get("scores") == "last" else "all",
        }
    shape.pop("seed", None)
    tokenizer.save(folder)
    config = {"model_type": "gpt2", "gptopt": {**shape, "tokenizer_size": tokenizer.size}}
    if files:
        config["gptopt_edge"] = {"target": "test", "files": facts}
    if tokenizer_size is not None:
        config["gptopt"]["tokenizer_size"] = tokenizer_size
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id}))
    if manifest:
        write_manifest(folder, "edge")
    return folder
