"""OpenVINO GenAI's LLMPipeline on token ids. Variants: fp32, bf16, int8, int4 (weights)."""

import importlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """See the package. Its prompt cache is off: a repeated prompt would cost nothing."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        self.lib: Any = importlib.import_module("openvino_genai")
        self.base: Any = importlib.import_module("openvino")
        scheduler = self.lib.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 8192
        precision = {"fp32": {"INFERENCE_PRECISION_HINT": "f32"},
                     "bf16": {"INFERENCE_PRECISION_HINT": "bf16"}}.get(variant, {})  # fmt: skip
        self.pipe = self.lib.LLMPipeline(
            str(model), "CPU", INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1,
            ATTENTION_BACKEND="PA", scheduler_config=scheduler, **precision,
        )  # fmt: skip
        self.version = f"openvino-genai {self.lib.__version__}"
        self.disk_bytes = (model / "openvino_model.bin").stat().st_size
        self.cache_bytes = 1 if variant.startswith("int") else 2  # as the models' rt_info asks

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package. A batch is timed as a whole, less a run of one token."""
        config = self.lib.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = new
        ids = np.ascontiguousarray(ids)
        text = self.lib.TokenizedInputs(self.base.Tensor(ids), self.base.Tensor(np.ones_like(ids)))
        if len(ids) == 1:
            return self._streamed(text, config)
        began = time.perf_counter()
        config.max_new_tokens = config.min_new_tokens = 1
        self.pipe.generate(text, config)
        first = time.perf_counter()
        config.max_new_tokens = config.min_new_tokens = new
        out = self.pipe.generate(text, config)
        each = max((time.perf_counter() - first) - (first - began), 1e-9) / max(new - 1, 1)
        stamps = [began, *(first + each * step for step in range(new))]
        return np.array([list(row)[:new] for row in out.tokens]), stamps

    def _streamed(self, text: Any, config: Any) -> tuple[Any, list[float]]:
        lib, stamps = self.lib, [0.0]

        def told(clock: Any, token: Any) -> Any:
            count = len(token) if isinstance(token, list) else 1
            stamps.extend([time.perf_counter()] * count)
            return lib.StreamingStatus.RUNNING

        methods = {"write": told, "end": lambda clock: None}
        clock = type("Clock", (lib.StreamerBase,), methods)()
        stamps[0] = time.perf_counter()
        out = self.pipe.generate(text, config, clock)
        return np.array([list(out.tokens[0])[: config.max_new_tokens]]), stamps


def prepare(source: Path, out: Path, variant: str) -> None:
    """optimum-intel's export; nncf's weight compression for int8 and int4."""
    base: Any = importlib.import_module("openvino")
    plain = out.with_name("openvino_genai-fp32")
    if not (plain / "openvino_model.xml").is_file():
        intel: Any = importlib.import_module("optimum.intel")
        intel.OVModelForCausalLM.from_pretrained(
            source, export=True, compile=False, load_in_8bit=False, use_cache=True
        ).save_pretrained(plain)
        _tokenizers(source, plain)
    if variant == "fp32":
        return
    if variant == "bf16":
        shutil.copytree(plain, out, dirs_exist_ok=True)
        return
    nncf: Any = importlib.import_module("nncf")
    mode = nncf.CompressWeightsMode
    ways = {"int8": {"mode": mode.INT8_ASYM},
            "int4": {"mode": mode.INT4_SYM, "group_size": 64, "ratio": 1.0}}  # fmt: skip
    model = base.Core().read_model(plain / "openvino_model.xml")
    out.mkdir(parents=True, exist_ok=True)
    compressed = nncf.compress_weights(model, **ways[variant])
    base.save_model(compressed, out / "openvino_model.xml", compress_to_fp16=False)
    for path in plain.iterdir():
        if path.is_file() and not path.name.startswith("openvino_model"):
            shutil.copy(path, out)


def _tokenizers(source: Path, out: Path) -> None:
    """The pipeline insists on a tokenizer beside the model."""
    base: Any = importlib.import_module("openvino")
    kit: Any = importlib.import_module("openvino_tokenizers")
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    made = kit.convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(made, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        base.save_model(model, out / f"{name}.xml")
