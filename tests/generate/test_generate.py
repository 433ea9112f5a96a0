"""`gptopt generate`, and that the edge says what PyTorch says."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch

from gptopt.config import GenerateOptions, RunOptions, SamplingOptions
from gptopt.errors import UserError
from gptopt.generate import generate, generate_text, generate_tokens
from gptopt.runtime import EdgeModel
from gptopt.runtime.verbs import run

GREEDY = SamplingOptions(temperature=0, max_new_tokens=10)
PROMPTS = [[5, 9, 200, 31, 7], [3], [8, 100, 2, 2, 290, 17, 33, 4, 60, 61, 62]]


def tokens(model, prompts, sampling=GREEDY, **more):
    return [row.tokens for row in generate_tokens(model, prompts, sampling, **more).rows]


def reference_greedy(model, prompt, steps):
    """Greedy tokens from whole windows: no cache, no batch, no loop of ours."""
    window, said = list(prompt), []
    for _ in range(steps):
        if len(window) > 16:
            window = window[-8:]
        with torch.no_grad():
            said.append(int(model(torch.tensor([window])).logits[0, -1].argmax()))
        window.append(said[-1])
    return said


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"position": "rotary", "n_kv_head": 1, "norm": "rmsnorm", "activation": "swiglu"},
        {"position": "alibi"},
        {"position": "sinusoidal", "norm_position": "post"},
        {"position": "none", "window": 5},
    ],
    ids=lambda sizes: sizes.get("position", "learned"),
)
def test_greedy_is_the_argmax_of_each_step(make_model, sizes):
    model = make_model(**sizes)
    for context, steps in (("error", [12, 16, 6]), ("slide", [40, 40, 40])):
        sampling = SamplingOptions(temperature=0, max_new_tokens=steps[0])
        expected = [reference_greedy(model, p, n) for p, n in zip(PROMPTS, steps, strict=True)]
        if context == "error":
            expected = [e[: min(12, 17 - len(p))] for e, p in zip(expected, PROMPTS, strict=True)]
        assert tokens(model, PROMPTS, sampling, context=context) == expected
        alone = [tokens(model, [p], sampling, context=context)[0] for p in PROMPTS]
        assert alone == expected
    assert len({token for row in expected for token in row}) > 20


def test_a_prompt_longer_than_the_context_slides_or_is_refused(model):
    prompt = list(range(40))
    with pytest.raises(UserError, match="prompt 1 has 40 tokens, the model sees 16"):
        tokens(model, [prompt])
    assert tokens(model, [prompt], context="slide")[0] == reference_greedy(model, prompt, 10)


def test_a_masked_model_is_refused(make_model):
    with pytest.raises(UserError, match="masked language model"):
        tokens(make_model(causal=False), PROMPTS)


def test_the_models_mode_and_the_global_generator_are_left_alone(make_model, tokenizer):
    model = make_model(dropout=0.5).train()
    state = torch.get_rng_state()
    sampling = SamplingOptions(max_new_tokens=5, temperature=1.0)
    first = generate_text(model, tokenizer, "fox", sampling)
    assert generate_text(model, tokenizer, "fox", sampling) == first  # and no dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_text_continues_without_the_prompt(model, tokenizer):
    for prompt in ("", "fox", "The quick brown fox jumps over the lazy dog. " * 3):
        text = generate_text(model, tokenizer, prompt, GREEDY)
        assert text
        assert not text.startswith(prompt or "\0")


@contextlib.contextmanager
def zeroed(block):
    saved = {name: value.clone() for name, value in block.state_dict().items()}
    for parameter in block.parameters():
        parameter.zero_()
    yield
    block.load_state_dict(saved)


# --- the edge beside it -------------------------------------------------------------------------


def test_the_edge_says_the_same_greedy_tokens(model, tokenizer, edge_folder):
    edge = EdgeModel(edge_folder, threads=1)
    for context, steps in (("error", 12), ("slide", 60)):
        sampling = SamplingOptions(temperature=0, max_new_tokens=steps, repetition_penalty=3.0)
        ours = tokens(model, PROMPTS, sampling, tokenizer=tokenizer, context=context)
        assert edge.generate(PROMPTS, sampling, context, end_ids=()) == ours
    assert len({token for row in ours for token in row}) > 64
    for block in model.blocks:  # and a model that lacks one block says something else
        with torch.no_grad(), zeroed(block):
            assert tokens(model, PROMPTS, sampling, tokenizer=tokenizer, context=context) != ours


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_p": 0.9, "min_p": 0.01}, {"repetition_penalty": 1.3}]
)
def test_the_edge_samples_the_same_tokens_from_a_seed(model, tokenizer, edge_folder, options):
    edge = EdgeModel(edge_folder, threads=1)
    sampling = SamplingOptions(temperature=0.9, max_new_tokens=12, seed=4, **options)
    found = edge.generate(PROMPTS, sampling, end_ids=())
    assert found == tokens(model, PROMPTS, sampling, tokenizer=tokenizer)


def test_both_verbs_agree(model_folder, edge_folder, capsys):
    sampling = {"prompt": ["The fox", "x"], "temperature": 0.0, "max_new_tokens": 8, "stop": ["zz"]}
    torch_result = generate(GenerateOptions(model=str(model_folder), **sampling))
    torch_out = capsys.readouterr().out
    edge_result = run(RunOptions(folder=str(edge_folder), **sampling, threads=1))
    assert torch_out == capsys.readouterr().out
    assert torch_result["results"] == edge_result["results"]
    different = {"device", "provider", "precision", "time_to_first_token_ms", "tokens_per_second"}
    assert set(torch_result) ^ set(edge_result) == {"device", "provider", "precision"}
    for key in set(torch_result) - different:
        assert torch_result[key] == edge_result[key]


def test_the_command_prints_one_json_object(gptopt, model_folder):
    done = gptopt(
        "generate", model_folder, "--prompt", "The fox", "--max-new-tokens", 4, "--temperature", 0,
        "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["device"] == "cpu"
    assert len(result["tokens"]) == result["new_tokens"] == 4
    options = GenerateOptions(
        model=str(model_folder), prompt=["The fox"], temperature=0, max_new_tokens=4, json=True
    )
    assert generate(options)["tokens"] == result["tokens"]


def test_an_exported_folder_is_sent_to_run(edge_folder):
    with pytest.raises(UserError, match=r"is an exported folder; use gptopt run"):
        generate(GenerateOptions(model=str(edge_folder), prompt=["x"]))


def test_a_model_without_a_tokenizer_reads_no_prompt(model, tmp_path):
    from gptopt.checkpoint import save_model

    save_model(tmp_path, model, None)
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        generate(GenerateOptions(model=str(tmp_path), prompt=["x"]))


def test_torch_and_numpy_see_the_same_scores(model, edge_folder):
    ids = np.array(PROMPTS[2])[None]
    found, _ = EdgeModel(edge_folder, threads=1).forward(ids)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 2e-5 * np.ptp(expected)
    assert math.isfinite(found.sum())
