"""From a model to a proven folder: the stages in a row, and the files that clients read.

What each client expects of the folder is said where it is written. Nothing is left behind unless
the proof holds.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir
from torch import nn

from gptopt import hf
from gptopt.config import ModelConfig
from gptopt.errors import CheckFailed, UserError
from gptopt.export.card import model_card
from gptopt.export.contract import Contract
from gptopt.export.lowering import lower
from gptopt.export.passes import clean
from gptopt.export.targets import STANDARD, Target
from gptopt.export.trace import Exportable, trace
from gptopt.export.validate import Proof, prove
from gptopt.manifest import staged_folder, write_json, write_manifest, write_text

if TYPE_CHECKING:
    from gptopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

KIND = "edge"
GRAPH = "onnx/model.onnx"
REPORT = "report.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_model(
    model: nn.Module,
    tokenizer: "Tokenizer | None",
    folder: Path,
    *,
    force: bool = False,
    target: Target = STANDARD,
) -> dict[str, Any]:
    """Export a model to ONNX, prove the export, and write the folder only if the proof holds.

    Args:
        model: gptopt's GPT, or any module that keeps `trace.Exportable`; float32, eval().
        tokenizer: goes into the folder; without one the folder serves clients of token ids only.
        folder: the folder to write.
        force: replace the folder if it exists.
        target: what the graph is made for.

    Returns:
        The report that is written to report.json.

    Raises:
        UserError: the folder exists, or the model cannot be exported.
        CheckFailed: the graph does not say what the model says; no folder is written.
    """
    config = _config_of(model, tokenizer)
    seconds: dict[str, float] = {}
    with staged_folder(folder, force=force) as staging:
        graph = build_graph(model, config, target, seconds)
        external = _write_graph(staging, graph, target)
        nodes = graph.graph.num_nodes()
        del graph
        _write_configs(staging, config, tokenizer, external=external)
        proof = prove(
            staging / GRAPH, model, vocab_size=None if tokenizer is None else tokenizer.size
        )
        if not proof.passed:
            raise CheckFailed(
                f"{folder}: not written, the graph does not say what the model says: "
                f"{proof.failure}; this is a fault of the export, please report it with the "
                f"model's config.json"
            )
        seconds["prove"] = proof.seconds
        report = _report(staging, model, target, nodes, proof, seconds)
        write_json(staging / REPORT, report)
        write_text(
            staging / "README.md", model_card(config, report, tokenizer=tokenizer is not None)
        )
        write_manifest(staging, KIND)
    return report


def build_graph(
    model: nn.Module, config: ModelConfig, target: Target, seconds: dict[str, float] | None = None
) -> ir.Model:
    """Trace, lower, clean. `seconds` receives how long each stage took."""
    contract = Contract.of(config)
    taken = {} if seconds is None else seconds
    logger.info("exporting %s", type(model).__name__)
    start = time.monotonic()
    program = trace(model, contract)
    traced = time.monotonic()
    graph = lower(program, contract, target)
    lowered = time.monotonic()
    clean(graph)
    taken.update(trace=traced - start, lower=lowered - traced, clean=time.monotonic() - lowered)
    logger.info("exported to %d nodes, now the proof", graph.graph.num_nodes())
    return graph


def _config_of(model: nn.Module, tokenizer: "Tokenizer | None") -> ModelConfig:
    config = getattr(cast(Exportable, model), "config", None)
    name = type(model).__name__
    if not isinstance(config, ModelConfig) or config.vocab_size is None:
        raise UserError(
            f"{name}.config: expected a gptopt ModelConfig with vocab_size, found "
            f"{type(config).__name__}; give the module one that states its sizes"
        )
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids, {name} only {config.vocab_size}; use the "
            f"tokenizer it was trained with"
        )
    return config


def _write_graph(folder: Path, graph: ir.Model, target: Target) -> bool:
    """Write onnx/model.onnx; whether its weights lie beside it in onnx/model.onnx_data."""
    path = folder / GRAPH
    path.parent.mkdir()
    weights = graph.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    external = size > target.inline_limit_bytes
    # transformers.js looks for `<file>_data`.
    ir.save(graph, path, external_data=f"{path.name}_data" if external else None)
    return external


def _write_configs(
    folder: Path, config: ModelConfig, tokenizer: "Tokenizer | None", *, external: bool
) -> None:
    ids: Mapping[str, int] = {}
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=config.block_size)
        ids = dict(
            zip(_TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True)
        )
    write_json(folder / "config.json", _hf_config(config, tokenizer, ids, external))
    write_json(folder / "generation_config.json", dict(ids))
    if tokenizer is not None and config.causal:
        write_json(folder / "genai_config.json", _genai_config(config, ids))


def _hf_config(
    config: ModelConfig, tokenizer: "Tokenizer | None", ids: Mapping[str, int], external: bool
) -> dict[str, Any]:
    """config.json with a model_type that clients know.

    transformers.js and optimum read no more from it than the names and sizes of the cache, and they
    refuse types they have never heard of, so a model that is neither declares the nearest one. What
    the model really is stands under "gptopt".
    """
    architecture = hf.architecture_of(config)
    if architecture == hf.OWN:
        plain = config.kv_heads == config.n_head and config.head_dim in (
            None,
            config.n_embd // config.n_head,
        )
        architecture = "gpt2" if plain else "llama"
    size = config.vocab_size if tokenizer is None else tokenizer.size
    values = hf.config_to_json(
        config, architecture=architecture, token_ids=ids, tokenizer_size=size
    )
    # In a browser transformers.js would ask for a quantised file by default.
    js: dict[str, Any] = {"dtype": "fp32"}
    if external:
        js["use_external_data_format"] = {Path(GRAPH).name: 1}
    return values | {"transformers.js_config": js}


def _genai_config(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """genai_config.json. onnxruntime-genai refuses keys it does not know, so there are no others.

    The type is `decoder`: `gpt2` selects a class with another form of cache. Attention with a
    concatenated cache cannot share its buffer.
    """
    return {
        "model": {
            "type": "decoder",
            **ids,
            "vocab_size": config.vocab_size,
            "context_length": config.block_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "head_size": config.head_size,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_hidden_layers": config.n_layer,
                "num_key_value_heads": config.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": config.block_size,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _report(
    folder: Path,
    model: nn.Module,
    target: Target,
    nodes: int,
    proof: Proof,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    import onnxruntime
    import torch

    parameters = sum(parameter.numel() for parameter in model.parameters())
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        **proof.as_dict(),
        "parameters": parameters,
        "files": files,
        "graph": {
            "target": target.name,
            "opset": target.opset,
            "ir_version": target.ir_version,
            "nodes": nodes,
        },
        "seconds": {stage: round(taken, 3) for stage, taken in seconds.items()},
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
