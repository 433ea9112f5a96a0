"""The exported model in onnxruntime: cache, padding, contract, provider, context edge."""

import json

import numpy as np
import onnx
import pytest

from gptopt.config import RunOptions, SamplingOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import write_manifest
from gptopt.runtime import EdgeModel
from gptopt.runtime.verbs import run

GREEDY = SamplingOptions(temperature=0, max_new_tokens=8)


def reference_greedy(edge, prompt, steps):
    """Greedy tokens without a cache, a batch or a loop: the whole window in, one token out."""
    block, window, tokens = edge.block_size, list(prompt), []
    for _ in range(steps):
        if len(window) > block:
            window = window[-(block // 2) :]
        logits, _ = edge.forward([window])
        tokens.append(int(logits[0, -1, : edge.tokenizer_size].argmax()))
        window.append(tokens[-1])
    return tokens


def test_prefill_and_decode_agree_with_one_forward(edge, rng_ids):
    ids = rng_ids(2, 9)
    whole, present = edge.forward(ids)
    first, cache = edge.forward(ids[:, :4])
    second, cache = edge.forward(ids[:, 4:], past=cache)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=2e-5)
    assert whole.dtype == np.float32
    assert whole.shape == (2, 9, edge.config["vocab_size"])
    for (key, value), (expected_key, expected_value) in zip(cache, present, strict=True):
        np.testing.assert_allclose(key, expected_key, atol=1e-5)
        np.testing.assert_allclose(value, expected_value, atol=1e-5)


def test_left_padding_changes_nothing(edge, rng_ids):
    ids = rng_ids(1, 6)
    plain, _ = edge.forward(ids)
    padded, _ = edge.forward(
        np.concatenate([[[0, 0, 0]], ids], 1), attention_mask=[[0, 0, 0] + [1] * 6]
    )
    np.testing.assert_allclose(padded[:, 3:], plain, atol=2e-5)


def test_results_stay_valid_after_later_runs(edge, rng_ids):
    logits, cache = edge.forward(rng_ids(1, 5))
    copies = [logits.copy(), *(array.copy() for pair in cache for array in pair)]
    for _ in range(3):
        edge.forward(rng_ids(1, 12))
    for array, copy in zip([logits, *(a for p in cache for a in p)], copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_greedy_is_the_argmax_of_each_step(edge, prompts):
    for prompt in prompts:
        steps = min(8, edge.block_size + 1 - len(prompt))
        found = edge.generate([prompt], GREEDY, end_ids=())[0]
        assert found == reference_greedy(edge, prompt, steps)
    assert len({token for p in prompts for token in edge.generate([p], GREEDY)[0]}) > 6


def test_a_batch_says_what_its_rows_say_alone(edge, prompts):
    alone = [edge.generate([prompt], GREEDY, end_ids=())[0] for prompt in prompts]
    assert edge.generate(prompts, GREEDY, end_ids=()) == alone


@pytest.mark.parametrize("steps", [1, 15, 40])
def test_a_sliding_context_goes_on(edge, prompts, steps):
    options = SamplingOptions(temperature=0, max_new_tokens=steps)
    long_prompt = prompts[2] * 3
    expected = [reference_greedy(edge, prompt, steps) for prompt in [*prompts, long_prompt]]
    found = edge.generate([*prompts, long_prompt], options, context="slide", end_ids=())
    assert found == expected


def test_a_full_context_ends_the_text_and_says_so(edge, prompts):
    options = SamplingOptions(temperature=0, max_new_tokens=100)
    done = edge.complete(prompts, options, end_ids=())
    assert [row.finish_reason for row in done.rows] == ["context"] * 3
    # The last token is predicted from a full context.
    assert [len(p) + len(r.tokens) for p, r in zip(prompts, done.rows, strict=True)] == [17] * 3
    assert [row.tokens for row in done.rows] == [
        reference_greedy(edge, p, 17 - len(p)) for p in prompts
    ]


def test_a_prompt_as_long_as_the_context_gets_one_token(edge, rng_ids):
    prompt = rng_ids(1, 16)[0].tolist()
    done = edge.complete([prompt], GREEDY, end_ids=())
    assert (len(done.rows[0].tokens), done.rows[0].finish_reason) == (1, "context")


def test_a_prompt_longer_than_the_context_is_refused(edge, rng_ids):
    with pytest.raises(UserError, match="prompt 1 has 17 tokens, the model sees 16"):
        edge.generate(rng_ids(1, 17).tolist(), GREEDY)


def test_ids_of_the_padding_are_never_chosen(build_folder, prompts):
    """With a vocabulary that is nearly all padding, unfiltered scores would choose it."""
    edge = EdgeModel(build_folder(vocab_size=4096), threads=1)
    options = SamplingOptions(temperature=0, max_new_tokens=6)
    logits, _ = edge.forward([prompts[0]])
    assert (logits[0].argmax(-1) >= edge.tokenizer_size).any()
    for sampling in (options, options.model_copy(update={"temperature": 2.0})):
        rows = edge.generate(prompts[:2], sampling, end_ids=())
        assert max(token for row in rows for token in row) < edge.tokenizer_size


def test_a_masked_model_runs_but_does_not_generate(build_folder, rng_ids):
    edge = EdgeModel(build_folder(causal=False), threads=1)
    ids = rng_ids(2, 7)
    logits, cache = edge.forward(ids)
    assert cache == []
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 200
    assert np.abs(edge.forward(changed)[0][:, 0] - logits[:, 0]).max() > 1e-3
    with pytest.raises(UserError, match="masked language model"):
        edge.generate(ids.tolist(), GREEDY)


def test_an_unavailable_provider_is_refused_by_name(pristine):
    with pytest.raises(UserError, match=r"--provider cuda: .*available here: cpu"):
        EdgeModel(pristine, provider="cuda")
    with pytest.raises(UserError, match=r"--provider quantum: is unknown; available here: cpu"):
        EdgeModel(pristine, provider="quantum")


def test_a_provider_that_fell_back_is_refused(pristine, monkeypatch):
    """A build that lists CUDA on a machine without a driver runs on the CPU, with a warning."""
    import onnxruntime

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *args, providers, **kwargs: real(*args, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(UserError, match="CUDAExecutionProvider was asked for, onnxruntime runs"):
        EdgeModel(pristine, provider="cuda")


def test_the_tokenizer_is_read_when_it_is_asked_for(folder):
    edge = EdgeModel(folder, threads=1)
    edge.new_cache().read([[1, 2, 3]])
    assert "tokenizer" not in vars(edge)
    assert edge.tokenizer is edge.tokenizer
    late = EdgeModel(folder, threads=1)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(CheckFailed, match="was changed while it was read; load it again"):
        late.tokenizer  # noqa: B018 - reading it is what raises


def test_end_of_text_ids_come_from_the_folder_and_the_tokenizer(folder, tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    write_manifest(folder, "edge")
    edge = EdgeModel(folder, threads=1)
    assert edge.end_ids == sorted({3, 5, tokenizer.eos_id})
    prompt = [1, 2]
    free = edge.generate([prompt], GREEDY, end_ids=())[0]
    stopped = edge.complete([prompt], GREEDY, end_ids=[free[2]]).rows[0]
    assert stopped.tokens == free[: free.index(free[2]) + 1]
    assert stopped.finish_reason == "eos"


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["gptopt"].update(values)
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, "edge")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 3}, r"inputs lack past_key_values.2.key, past_key_values.2.value, which"),
        ({"n_layer": 1}, r"inputs hold past_key_values.1.key, past_key_values.1.value, unknown"),
        ({"n_head": 4}, r"past_key_values.0.key is tensor\(float\) .* config.json says"),
        ({"vocab_size": 4096}, r"logits is tensor\(float\) .*4096"),
        ({"tokenizer_size": 299}, r"tokenizer.json: has 300 ids, config.json says 299"),
    ],
)
def test_a_graph_that_breaks_its_configuration_is_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(CheckFailed, match=message):
        EdgeModel(folder, threads=1).tokenizer  # noqa: B018 - it is read when asked for


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
        ({"n_layer": -1}, "n_layer"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"block_size": "many"}, "block_size"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"tokenizer_size": 10**6}, "does not fit"),
        ({"tokenizer_size": True}, "lacks vocab_size or tokenizer_size"),
    ],
)
def test_impossible_sizes_are_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(UserError, match=message):
        EdgeModel(folder, threads=1)


def test_renamed_and_retyped_inputs_are_refused(folder):
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match=r"model.onnx: onnxruntime refuses it|input_ids is"):
        EdgeModel(folder, threads=1)


def test_broken_weights_are_told_from_a_choice(folder, prompts):
    data = folder / "onnx" / "model.onnx_data"
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match="logits are not finite"):
        EdgeModel(folder, threads=1).generate(prompts, GREEDY)


@pytest.fixture
def rng_ids(tokenizer):
    rng = np.random.default_rng(11)
    return lambda B, T: rng.integers(0, tokenizer.size - 1, size=(B, T))


def test_a_folder_without_a_tokenizer_serves_token_ids(folder, prompts):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    change_config(folder, tokenizer_size=320)
    edge = EdgeModel(folder, threads=1)
    assert edge.tokenizer is None
    assert [len(tokens) for tokens in edge.generate(prompts[:2], GREEDY)] == [8, 8]
    with pytest.raises(UserError, match="exported without a tokenizer"):
        run(RunOptions(folder=str(folder), prompt=["x"]))


def test_prompts_may_hold_padding_ids_that_are_never_chosen(edge):
    options = GREEDY.model_copy(update={"repetition_penalty": 1.5})
    assert len(edge.generate([[edge.vocab_size - 1]], options, end_ids=())[0]) == 8


def test_a_prompt_read_in_parts_says_the_same(edge, prompts, monkeypatch):
    whole = edge.generate(prompts, GREEDY, end_ids=())
    monkeypatch.setattr("gptopt.runtime.cache.SCORES_AT_ONCE", 1)
    monkeypatch.setattr("gptopt.runtime.cache.SHORTEST_PART", 4)
    assert edge.generate(prompts, GREEDY, end_ids=()) == whole
