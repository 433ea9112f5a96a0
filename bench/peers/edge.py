"""gptopt's own runtime on an exported folder; the variant is the precision."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from gptopt.runtime.edge import EdgeModel
from gptopt.runtime.settings import measured


class Peer:
    """See the package."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        import onnxruntime

        tuned = measured("cpu")
        fits = tuned is not None and tuned.threads <= threads  # as every contender, at most so many
        self.model = EdgeModel(model, precision=variant, threads=0 if fits else threads)
        chosen = self.model.settings
        self.version = (
            f"onnxruntime {onnxruntime.__version__}, {chosen.threads} threads, spinning "
            f"{chosen.spinning}"
        )
        path = model / self.model.file.file
        both = (path, path.with_name(path.name + "_data"))
        self.disk_bytes = sum(part.stat().st_size for part in both if part.is_file())
        kind = self.model.file.cache_dtype
        self.cache_bytes = {"int8": 1, "float16": 2}.get(kind or "float32", 4)

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        cache = self._empty(len(ids))
        live = np.ones(len(ids), dtype=np.bool_)
        stamps = [time.perf_counter()]
        token = cache.read(ids.tolist()).argmax(axis=-1)
        made = [token]
        stamps.append(time.perf_counter())
        for _ in range(new - 1):
            token = cache.step(token, live).argmax(axis=-1)
            made.append(token)
            stamps.append(time.perf_counter())
        return np.stack(made, axis=1), stamps

    def _empty(self, rows: int) -> Any:
        """The cache that a user keeps between two texts."""
        kept = self.model.cache
        if kept is None or kept.rows != rows:
            kept = self.model.cache = self.model.new_cache(rows)
        kept.rewind(0)
        return kept
