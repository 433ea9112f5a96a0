"""The whole road through the real command line, small: text -> tokens -> GPT -> ONNX -> edge."""

import json
import re
import struct
from pathlib import Path

import pytest

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PROMPT = "alpha beta"


def sentences(n):
    """A corpus with structure to learn: each word is followed by one of two others."""
    state, words = 1, []
    for _ in range(n):
        state = (state * 1103515245 + 12345) % 2**31
        words.append(WORDS[(len(words) * 3 + (state >> 16) % 2) % len(WORDS)])
    return " ".join(words) + "\n"


@pytest.fixture(scope="module")
def road(tmp_path_factory, gptopt):
    """Every verb once; the folders and the JSON each printed."""
    folder = tmp_path_factory.mktemp("road")
    (folder / "text").mkdir()
    for index in range(8):
        (folder / "text" / f"{index}.txt").write_text(sentences(400 + index))
    results = {}

    def step(verb, *arguments):
        done = gptopt(verb, *arguments, "--json")
        results[verb] = json.loads(done.stdout)
        return results[verb]

    data, run, edge = folder / "data", folder / "run", folder / "edge"
    step("tokenize", folder / "text", "--out", data, "--vocab-size", 300)
    step(
        "train", data, "--out", run, "--steps", 60, "--batch-size", 8, "--lr", "5e-3",
        "--warmup-steps", 5, "--eval-every", 20, "--log-every", 1, "--model.n-layer", 2,
        "--model.n-head", 2, "--model.n-embd", 32, "--model.block-size", 32,
    )  # fmt: skip
    step("export", run, "--out", edge)
    return folder, results


def test_training_learns(road):
    folder, results = road
    trained = results["train"]
    text = (folder / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert losses[-1] < losses[0] - 1.0
    assert trained["val_loss"] < losses[0] - 1.0
    assert (folder / "run" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json_has_the_keys_that_the_readme_lists(road, gptopt):
    folder, results = road
    greedy = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "2", "--json"]
    results = {**results, "run": json.loads(gptopt("run", folder / "edge", *greedy).stdout)}
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for verb in ("tokenize", "train", "run"):
        row = next(line for line in readme.splitlines() if re.match(rf"\| .*`{verb}`.* \|", line))
        listed = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", row))))
        assert set(results[verb]) <= listed, verb


def test_generate_and_run_give_the_same_greedy_tokens(road, gptopt):
    folder, _ = road
    greedy = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "20", "--json"]
    in_torch = json.loads(gptopt("generate", folder / "run", *greedy).stdout)
    at_edge = json.loads(gptopt("run", folder / "edge", *greedy).stdout)
    assert in_torch["tokens"] == at_edge["tokens"]
    assert in_torch["text"] == at_edge["text"]
    assert len(in_torch["tokens"]) == 20


def test_evaluate_agrees_between_torch_and_the_edge(road, gptopt):
    folder, _ = road
    scores = [
        json.loads(gptopt("evaluate", folder / name, "--data", folder / "data", "--json").stdout)
        for name in ("run", "edge")
    ]
    assert scores[0]["tokens"] == scores[1]["tokens"] > 0
    assert scores[0]["val_loss"] == pytest.approx(scores[1]["val_loss"], abs=1e-5)
    assert scores[0]["perplexity"] == pytest.approx(2.718281828 ** scores[0]["val_loss"], rel=1e-6)


def test_validate_proves_the_folder_again(road, gptopt):
    folder, results = road
    proof = json.loads(
        gptopt("validate", folder / "edge", "--model", folder / "run", "--json").stdout
    )
    assert proof["passed"] is True
    assert proof["max_abs_error"] <= proof["budget"]
    report = json.loads((folder / "edge" / "report.json").read_text())
    assert report["passed"] is True
    assert results["export"]["passed"] is True


def test_validate_refuses_another_model(road, gptopt, tmp_path):
    folder, _ = road
    other = tmp_path / "other"
    gptopt(
        "train", folder / "data", "--out", other, "--steps", 1, "--eval-every", 0, "--seed", 2,
        "--model.n-layer", 2, "--model.n-head", 2, "--model.n-embd", 32, "--model.block-size", 32,
    )  # fmt: skip
    done = gptopt("validate", folder / "edge", "--model", other, check=False)
    assert done.returncode == 1
    assert "gptopt: error:" in done.stderr


def test_a_run_folder_is_kept_without_resume_and_complete_with_it(road, gptopt):
    folder, _ = road
    again = ["train", folder / "data", "--out", folder / "run", "--steps", 60, "--batch-size", 8,
             "--lr", "5e-3", "--warmup-steps", 5, "--eval-every", 20, "--log-every", 1,
             "--model.n-layer", 2, "--model.n-head", 2, "--model.n-embd", 32,
             "--model.block-size", 32]  # fmt: skip
    refused = gptopt(*again, check=False)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    gptopt(*again, "--resume")
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_run_refuses_a_tampered_folder(road, gptopt, tmp_path):
    import shutil

    folder, _ = road
    edge = tmp_path / "edge"
    shutil.copytree(folder / "edge", edge)
    model = edge / "onnx" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    done = gptopt("run", edge, "--prompt", PROMPT, check=False)
    assert done.returncode == 1
    assert "model.onnx" in done.stderr
    assert done.stdout == ""


def test_run_refuses_a_provider_that_is_not_there(road, gptopt):
    folder, _ = road
    done = gptopt("run", folder / "edge", "--prompt", PROMPT, "--provider", "cuda", check=False)
    assert done.returncode == 2
    assert "cuda" in done.stderr.lower()


def test_text_goes_to_stdout_and_progress_to_stderr(road, gptopt):
    folder, _ = road
    done = gptopt("run", folder / "edge", "--prompt", PROMPT, "--temperature", "0",
                  "--max-new-tokens", "4")  # fmt: skip
    assert done.stdout.strip()
    assert "tokens/s" not in done.stdout


def test_triton_kernels_without_a_gpu_are_one_line(road, gptopt):
    folder, _ = road
    done = gptopt(
        "generate", folder / "run", "--prompt", PROMPT, "--kernels", "triton", "--device", "cpu",
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "impl='triton' cannot run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["generate", "run"])
def test_a_prompt_longer_than_the_context_is_one_line(road, gptopt, verb):
    folder, _ = road
    model = folder / ("run" if verb == "generate" else "edge")
    done = gptopt(verb, model, "--prompt", "alpha " * 200, check=False)
    assert done.returncode == 2
    assert "32" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", ["truncate", "foreign", "pickle"])
def test_a_damaged_model_folder_is_one_line(road, gptopt, tmp_path, damage):
    import shutil

    folder, _ = road
    name = (folder / "run" / "latest").read_text().strip()
    model = tmp_path / "model"
    shutil.copytree(folder / "run" / "checkpoints" / name, model)
    weights = model / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        header = b'{"other":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    else:
        weights.unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = gptopt("generate", model, "--prompt", PROMPT, check=False)
    assert done.returncode in (1, 2)
    assert "gptopt: error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupting_a_generation_leaves_quietly(road):
    import os
    import signal
    import subprocess
    import sys
    import time

    folder, _ = road
    command = [sys.executable, "-P", "-m", "gptopt", "run", str(folder / "edge"), "--prompt",
               PROMPT, "--max-new-tokens", "1000000", "--context", "slide"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.read(5)  # it is generating now
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
