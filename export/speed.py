"""How fast a file decodes here: the stopwatch of `--budget tokens/s`."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptopt.config import ModelConfig
from gptopt.export.stream import Growing, Shared, open_graph
from gptopt.runtime.variants import EdgeFile

_PROMPT, _STEPS = 16, 33  # tokens


def tokens_per_s(path: Path, config: ModelConfig, file: EdgeFile) -> float:
    """Tokens that one row gains per second behind a short prompt: the median of some steps."""
    session = open_graph(path, config, file)
    steps = min(_STEPS, config.block_size - 1)
    prompt = max(1, min(_PROMPT, config.block_size - steps))
    graph = Growing(session) if file.cache == "growing" else Shared(session, prompt + steps)
    past: list[Any] = []
    taken = []
    for end in [prompt, *range(prompt + 1, prompt + steps + 1)]:
        start = 0 if end == prompt else end - 1
        ids = np.zeros((1, end - start), dtype=np.int64)
        began = time.perf_counter()
        _, past = graph.run(ids, np.ones((1, end), np.bool_), np.arange(start, end)[None], past)
        taken.append(time.perf_counter() - began)
    return 1 / statistics.median(taken[1:])
