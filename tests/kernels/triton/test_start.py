"""How long the first use of all kernels of a model takes, with nothing compiled and with all."""

import json
import os
import subprocess
import sys

import pytest
import torch

COLD_SECONDS, WARM_SECONDS = 30.0, 2.0
MODELS = {
    "gpt2": {"dropout": 0.1},
    "llama": {
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "n_kv_head": 1,
    },
}
# A process of its own: a step of training and some generation, timed from the first kernel on.
PROGRAM = """
import json, sys, time
import torch
from gptopt.config import ModelConfig, SamplingOptions
from gptopt.generate import generate_tokens
from gptopt.model import GPT

device, sizes = torch.device(sys.argv[1]), json.loads(sys.argv[2])
wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
model = GPT(ModelConfig(**sizes), kernels="triton").to(device).train()
ids = torch.randint(sizes["vocab_size"], (2, sizes["block_size"]), device=device)
ids.float() @ ids.float().T  # the device and its libraries are up
wait()
started = time.perf_counter()
with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
    model(ids, ids).loss.backward()
wait()
trained = time.perf_counter()
model = model.to(torch.bfloat16) if device.type == "cuda" else model
sampling = SamplingOptions(temperature=0, max_new_tokens=4)
generate_tokens(model, [[1, 2, 3]], sampling, static_cache=True)
wait()
print(json.dumps({"train": trained - started, "all": time.perf_counter() - started}))
"""


def first_use(device, folder, **sizes) -> dict[str, float]:
    """Seconds of the program in a process whose caches are in `folder`."""
    own = {"TRITON_CACHE_DIR": str(folder / "triton"), "GPTOPT_CACHE_DIR": str(folder / "gptopt")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(device), json.dumps(sizes)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_program_that_is_timed_runs(tmp_path):
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 32}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = first_use(device, tmp_path, **tiny, **MODELS["llama"])
    assert 0.0 < seconds["train"] < seconds["all"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_the_first_use_of_all_kernels_is_bounded_cold_and_warm(tmp_path, name):
    sizes = {"n_layer": 2, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
    cold = first_use("cuda", tmp_path, **sizes, **MODELS[name])
    warm = first_use("cuda", tmp_path, **sizes, **MODELS[name])
    assert cold["all"] <= COLD_SECONDS, cold
    assert warm["all"] <= WARM_SECONDS, (cold, warm)
