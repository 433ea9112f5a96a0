"""The runtime's own cache, whose mask has more columns than tokens, on the graphs of `ort-cpu`."""

import numpy as np
import pytest
import torch
from random_models import random_gpt
from test_options import TOGETHER

from gptopt.export.stream import open_graph
from gptopt.export.targets import ORT_CPU
from gptopt.runtime.shared import SharedCache


@pytest.mark.parametrize("name", ["alibi", "window", "llama"])
def test_steps_say_what_the_model_says(name, export, monkeypatch):
    monkeypatch.setattr("gptopt.runtime.shared._COLUMNS", 8)
    model = random_gpt(**TOGETHER[name])
    path, build = export(model, ORT_CPU, told=True)
    assert build.target.cache == "shared"
    session = open_graph(path, model.config, build.target.facts("onnx/model.onnx"))
    size = model.config.block_size
    cache = SharedCache(session, 1, size, lambda: "")
    text = np.random.default_rng(1).integers(0, model.config.vocab_size, size=size).tolist()
    with torch.no_grad():
        want = model(torch.tensor([text])).logits[0].numpy()
    scores = [cache.read([text[:3]])[0].copy()]
    for token in text[3:]:
        scores.append(cache.step(np.array([token]), np.ones(1, np.bool_))[0].copy())
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.array(scores) / scale, want[2:] / scale, atol=2e-5)
