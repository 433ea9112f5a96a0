"""onnxruntime-genai. Variants: int4, fp32: its own builder's llama of GPT-2's size.

It builds no GPT-2. Or a file of a folder that gptopt exported, such as onnx/model_q4.onnx.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """See the package."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        self.lib: Any = importlib.import_module("onnxruntime_genai")
        config = self.lib.Config(str(model))
        decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": threads}}
        if variant.endswith(".onnx"):
            decoder["filename"] = variant
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        self.model = self.lib.Model(config)
        told = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))
        path = model / (decoder.get("filename") or told["model"]["decoder"]["filename"])
        parts = [*path.parent.glob(path.name), *path.parent.glob(path.name + "*data")]
        self.disk_bytes = sum(part.stat().st_size for part in parts)
        self.cache_bytes = 4
        self.version = f"onnxruntime-genai {self.lib.__version__}"

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        B, T = ids.shape
        parameters = self.lib.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=T + new, min_length=T + new, batch_size=B, do_sample=False, num_beams=1
        )
        generator = self.lib.Generator(self.model, parameters)
        text = ids.astype(np.int32)
        stamps, made = [time.perf_counter()], []
        generator.append_tokens(text if B > 1 else text[0])
        for _ in range(new):
            generator.generate_next_token()
            made.append(np.array(generator.get_next_tokens()))
            stamps.append(time.perf_counter())
        return np.stack(made, axis=1), stamps


def prepare(source: Path, out: Path, variant: str) -> None:
    """A llama as wide and deep as the source, random, through genai's builder."""
    transformers: Any = importlib.import_module("transformers")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        torch: Any = importlib.import_module("torch")
        torch.manual_seed(0)
        shape = transformers.LlamaConfig(
            vocab_size=config["vocab_size"], hidden_size=config["n_embd"],
            intermediate_size=config["n_embd"] * 8 // 3, num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"], num_key_value_heads=config["n_head"],
            max_position_embeddings=config["n_positions"], tie_word_embeddings=True,
            bos_token_id=config["vocab_size"] - 1, eos_token_id=config["vocab_size"] - 1,
        )  # fmt: skip
        model = Path(scratch) / "llama"
        transformers.LlamaForCausalLM(shape).save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((source / name).read_bytes())
        # -P: transformers must not find a folder called `kernels` where the bench was started.
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        command += ["-i", str(model), "-o", str(out), "-p", variant, "-c", str(Path(scratch) / "c")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
