"""optimum-onnx's ORTModelForCausalLM. Variants: fp32, int8 (dynamic, per channel)."""

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

_FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


class Peer:
    """See the package."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        from importlib.metadata import version

        self.torch: Any = importlib.import_module("torch")
        ort: Any = importlib.import_module("onnxruntime")
        optimum: Any = importlib.import_module("optimum.onnxruntime")
        self.torch.set_num_threads(threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = optimum.ORTModelForCausalLM.from_pretrained(
            model, file_name=_FILES[variant], session_options=options, use_io_binding=False
        )
        self.version = f"optimum-onnx {version('optimum-onnx')}, onnxruntime {ort.__version__}"
        self.disk_bytes = (model / _FILES[variant]).stat().st_size
        self.cache_bytes = 4

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        B, T = ids.shape
        text, past = self.torch.from_numpy(ids), None
        stamps, made = [time.perf_counter()], []
        for step in range(new):
            mask = self.torch.ones(B, T + step, dtype=self.torch.int64)
            out = self.model(
                input_ids=text, attention_mask=mask, past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            text = out.logits[:, -1].argmax(-1, keepdim=True)
            made.append(text.numpy())
            stamps.append(time.perf_counter())
        return np.concatenate(made, axis=1), stamps


def prepare(source: Path, out: Path, variant: str) -> None:
    """Export with optimum, and for int8 quantise the export."""
    optimum: Any = importlib.import_module("optimum.onnxruntime")
    plain = out.with_name("optimum_onnx-fp32")
    if not (plain / "model.onnx").is_file():
        model = optimum.ORTModelForCausalLM.from_pretrained(source, export=True, use_cache=True)
        model.save_pretrained(plain)
    if variant == "int8":
        configuration: Any = importlib.import_module("optimum.onnxruntime.configuration")
        chosen = configuration.AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer = optimum.ORTQuantizer.from_pretrained(plain, file_name="model.onnx")
        quantizer.quantize(save_dir=out, quantization_config=chosen)
        for name in ("config.json", "generation_config.json"):
            (out / name).write_bytes((plain / name).read_bytes())
