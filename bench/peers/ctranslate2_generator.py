"""CTranslate2's Generator. Variants: float32, int8."""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """See the package."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        lib: Any = importlib.import_module("ctranslate2")
        self.model = lib.Generator(
            str(model), device="cpu", compute_type=variant, intra_threads=threads, inter_threads=1
        )
        self.words = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))
        self.version = f"ctranslate2 {lib.__version__}, {self.model.compute_type}"
        self.disk_bytes = (model / "model.bin").stat().st_size
        self.cache_bytes = 4

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        texts = [[self.words[id_] for id_ in row] for row in ids]
        stamps = [time.perf_counter()]

        def told(step: Any) -> bool:
            if step.batch_id == len(texts) - 1:  # the last row of a step
                stamps.append(time.perf_counter())
            return False

        results = self.model.generate_batch(
            texts, max_length=new, min_length=new, beam_size=1, sampling_topk=1,
            include_prompt_in_result=False, end_token=[], callback=told,
        )  # fmt: skip
        return np.array([result.sequences_ids[0][:new] for result in results]), stamps


def prepare(source: Path, out: Path, variant: str) -> None:
    """Convert with CTranslate2's own converter."""
    converters: Any = importlib.import_module("ctranslate2.converters")
    converter = converters.TransformersConverter(str(source))
    converter.convert(str(out), quantization=variant, force=True)
