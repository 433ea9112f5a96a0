"""An exported graph of a random model, made once."""

import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from random_models import build_of, random_gpt

from gptopt.export.pipeline import build_graph
from gptopt.export.targets import GROWING


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """Write the graph of a model; the path of the ONNX file, and how the target was fitted."""

    def run(model, target=GROWING, told=False):
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        build = build_of(model, target)
        ir.save(build_graph(model, model.config, build), path)
        return (path, build) if told else path

    return run


@pytest.fixture(scope="session")
def gpt2(export):
    """A GPT-2 with a tied head: (model, path of its ONNX file)."""
    model = random_gpt(tie_head=True)
    return model, export(model)


@pytest.fixture(scope="session")
def llama(export):
    """Rotary, rmsnorm, swiglu, grouped heads, a window, capped scores, no biases."""
    model = random_gpt(
        position="rotary", norm="rmsnorm", activation="swiglu", n_kv_head=2, window=9,
        attn_softcap=20.0, logit_softcap=30.0, bias=False,
    )  # fmt: skip
    return model, export(model)


@pytest.fixture(scope="session")
def alibi(export):
    """Distances as biases, in a bidirectional model."""
    model = random_gpt(position="alibi", causal=False)
    return model, export(model)
