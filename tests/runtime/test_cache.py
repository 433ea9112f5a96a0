"""Every form of the cache says what the growing one says, rewound, branched and saved too."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptopt.config import SamplingOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.runtime import EdgeModel
from gptopt.runtime.session import Session

FILES = {
    "fp32": {"form": "growing"},
    "any": {"form": "any"},
    "right": {"form": "right"},
    "last": {"form": "right", "scores": "last"},
    "keep": {"form": "any", "scores": "keep"},
    "keepright": {"form": "right", "scores": "keep"},
    "kv8": {"form": "right", "cache": "int8"},
}
SHARED = [name for name in FILES if name not in ("fp32", "kv8")]
EVERY = [name for name in FILES if name != "kv8"]
BUDGET = 2e-5 * 14  # of the range of these logits
GREEDY = SamplingOptions(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def models(build_folder):
    """Precision -> the same weights in another form."""
    folder = build_folder(files=FILES, block_size=24)
    return {name: EdgeModel(folder, precision=name, threads=1) for name in FILES}


@pytest.fixture
def texts(tokenizer):
    """Three ragged texts."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, tokenizer.size - 1, size=n).tolist() for n in (4, 1, 9)]


def alone(model, text):
    """Scores (V,) behind a text, from one forward of the growing form."""
    return model.forward([text])[0][0, -1]


def expected(models, texts):
    return np.stack([alone(models["fp32"], text) for text in texts])


@pytest.mark.parametrize("name", SHARED)
def test_logits_are_those_of_the_growing_form(models, texts, name):
    cache = models[name].new_cache(3)
    np.testing.assert_allclose(cache.read(texts), expected(models, texts), atol=BUDGET)
    for step in range(5):
        ids = np.array([11 + step, 40 + step, 7 * step])
        texts = [[*text, int(id_)] for text, id_ in zip(texts, ids, strict=True)]
        found = cache.step(ids, np.ones(3, np.bool_))
        np.testing.assert_allclose(found, expected(models, texts), atol=BUDGET)
    assert cache.tokens == texts
    assert cache.lengths == [len(text) for text in texts]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("context", ["error", "slide"])
def test_generation_is_token_for_token_that_of_the_growing_form(models, texts, name, context):
    options = SamplingOptions(temperature=0, max_new_tokens=40)
    for prompts in (texts, texts[2:]):
        want = models["fp32"].complete(prompts, options, end_ids=(), context=context)
        found = models[name].complete(prompts, options, end_ids=(), context=context)
        assert [row.tokens for row in found.rows] == [row.tokens for row in want.rows]
        assert [r.finish_reason for r in found.rows] == [r.finish_reason for r in want.rows]
    assert len({token for row in want.rows for token in row.tokens}) >= 10


@pytest.mark.parametrize("name", ["keep", "keepright"])
def test_only_the_last_part_of_a_text_is_scored(models, name, monkeypatch):
    from gptopt.runtime import shared

    text = np.random.default_rng(9).integers(0, 250, size=17).tolist()
    scored, run = [], shared._Bound.scores
    monkeypatch.setattr(shared, "_PART", 5)
    monkeypatch.setattr(
        shared._Bound, "scores", lambda self, a: (scored.append(a.shape[1]), run(self, a))
    )
    found = models[name].new_cache().read([text])
    np.testing.assert_allclose(found, expected(models, [text]), atol=BUDGET)
    assert scored == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["any", "right"])
def test_a_batch_of_equal_lengths_and_one_in_parts_say_the_same(models, name, monkeypatch):
    rng = np.random.default_rng(8)
    texts = rng.integers(0, 250, size=(2, 20)).tolist()
    want = expected(models, texts)
    np.testing.assert_allclose(models[name].new_cache(2).read(texts), want, atol=BUDGET)
    monkeypatch.setattr("gptopt.runtime.cache.SCORES_AT_ONCE", 1)
    monkeypatch.setattr("gptopt.runtime.cache.SHORTEST_PART", 6)
    np.testing.assert_allclose(models[name].new_cache(2).read(texts), want, atol=BUDGET)
    monkeypatch.setattr("gptopt.runtime.shared._PART", 7)
    np.testing.assert_allclose(models[name].new_cache(2).read(texts), want, atol=BUDGET)


@pytest.mark.parametrize("name", EVERY)
def test_a_second_text_is_read_behind_the_first(models, texts, name):
    cache = models[name].new_cache(3)
    cache.read(texts)
    more = [[5, 6], [9], [1, 2, 3, 4]]
    whole = [one + two for one, two in zip(texts, more, strict=True)]
    np.testing.assert_allclose(cache.read(more), expected(models, whole), atol=BUDGET)
    assert cache.tokens == whole


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_take_no_part_stay_as_they_are(models, texts, name):
    cache = models[name].new_cache(3)
    cache.read(texts)
    for id_ in (3, 4, 5):
        cache.step(np.full(3, id_), np.array([True, False, True]))
    found = cache.step(np.array([8, 9, 10]), np.ones(3, np.bool_))
    texts = [[*texts[0], 3, 4, 5, 8], [*texts[1], 9], [*texts[2], 3, 4, 5, 10]]
    assert cache.tokens == texts
    np.testing.assert_allclose(found, expected(models, texts), atol=BUDGET)


@pytest.mark.parametrize("name", EVERY)
def test_rewinding_forgets(models, texts, name):
    cache = models[name].new_cache(3)
    cache.read([[*text, 99, 98, 97] for text in texts])
    cache.rewind([len(text) for text in texts])
    assert cache.tokens == texts
    found = cache.step(np.array([1, 2, 3]), np.ones(3, np.bool_))
    np.testing.assert_allclose(
        found, expected(models, [[*t, n] for t, n in zip(texts, (1, 2, 3), strict=True)]),
        atol=BUDGET,
    )  # fmt: skip
    cache.rewind(0)
    np.testing.assert_allclose(cache.read(texts), expected(models, texts), atol=BUDGET)
    with pytest.raises(UserError, match=r"cannot be rewound to \[5, 5, 5\] tokens, its rows hold"):
        cache.rewind(5)


@pytest.mark.parametrize("name", EVERY)
def test_branches_are_independent_copies_of_rows(models, texts, name):
    cache = models[name].new_cache(3)
    cache.read(texts)
    branch = cache.branch([2, 0, 2, 2])
    branch.step(np.array([1, 2, 3, 4]), np.ones(4, np.bool_))
    found = branch.step(np.array([5, 5, 5, 5]), np.ones(4, np.bool_))
    texts4 = [[*texts[2], 1, 5], [*texts[0], 2, 5], [*texts[2], 3, 5], [*texts[2], 4, 5]]
    np.testing.assert_allclose(found, expected(models, texts4), atol=BUDGET)
    assert cache.tokens == texts
    found = cache.step(np.array([1, 2, 3]), np.ones(3, np.bool_))
    texts3 = [[*t, n] for t, n in zip(texts, (1, 2, 3), strict=True)]
    np.testing.assert_allclose(found, expected(models, texts3), atol=BUDGET)
    with pytest.raises(UserError, match="rows 0 to 2; rows \\[3\\]"):
        cache.branch([3])


@pytest.mark.parametrize("name", list(FILES))
def test_a_saved_cache_goes_on_as_if_it_had_stayed(models, texts, name, tmp_path):
    model, path = models[name], tmp_path / "prompt.safetensors"
    cache = model.new_cache(3)
    cache.read(texts)
    cache.save(path)
    loaded = model.load_cache(path)
    assert loaded.tokens == texts
    ids, live = np.array([1, 2, 3]), np.ones(3, np.bool_)
    np.testing.assert_array_equal(loaded.step(ids, live).copy(), cache.step(ids, live))


@pytest.mark.parametrize("name", EVERY)
def test_a_given_cache_is_read_on_and_not_again(models, texts, name, monkeypatch):
    model = models[name]
    fresh = model.generate(texts, GREEDY, end_ids=())
    cache = model.new_cache(3)
    assert model.generate(texts, GREEDY, end_ids=(), cache=cache) == fresh
    longer = [text + new + [7] for text, new in zip(texts, fresh, strict=True)]
    want = model.generate(longer, GREEDY, end_ids=())
    read = []
    real = type(cache).read
    monkeypatch.setattr(type(cache), "read", lambda self, t: read.append(t) or real(self, t))
    assert model.generate(longer, GREEDY, end_ids=(), cache=cache) == want
    # The last token of the first generation was never read.
    assert read[0] == [[new[-1], 7] for new in fresh]
    assert model.generate(texts, GREEDY, end_ids=(), cache=cache) == fresh
    with pytest.raises(UserError, match="has 3 rows, 1 prompts"):
        model.generate(texts[:1], GREEDY, cache=cache)


@pytest.mark.parametrize("name", EVERY)
def test_a_given_cache_reaches_the_edge_of_the_context_and_slides(models, texts, name):
    options = SamplingOptions(temperature=0, max_new_tokens=30)
    model = models[name]
    cache = model.new_cache(3)
    for prompts in (texts, [[*text, 3, 1] for text in texts], texts):
        want = model.generate(prompts, options, end_ids=(), context="slide")
        assert model.generate(prompts, options, end_ids=(), context="slide", cache=cache) == want


def test_a_full_row_is_told_from_one_with_room(models):
    cache = models["right"].new_cache(2)
    cache.read([[1] * 24, [2] * 3])
    with pytest.raises(UserError, match="holds 24 columns, 25 are needed"):
        cache.step(np.array([1, 1]), np.ones(2, np.bool_))
    found = cache.step(np.array([1, 7]), np.array([False, True]))
    np.testing.assert_allclose(found[1], alone(models["fp32"], [2, 2, 2, 7]), atol=BUDGET)
    assert cache.lengths == [23, 4]  # a full row that waits loses its last token
    for name in ("any", "fp32"):
        cache = models[name].new_cache(1)
        cache.read([[1] * 24])
        with pytest.raises(UserError, match="holds 24 columns, 25 are needed"):
            cache.step(np.array([1]), np.ones(1, np.bool_))
        with pytest.raises(UserError, match="one or more tokens for each"):
            cache.read([[]])


def test_an_int8_cache_is_near_the_float_one(models, texts):
    cache = models["kv8"].new_cache(3)
    want = expected(models, texts)
    found = cache.read(texts)
    assert 0 < np.abs(found - want).max() < 0.1 * np.ptp(want)
    assert cache._buffer.dtype == np.int8
    step = cache.step(np.array([1, 2, 3]), np.ones(3, np.bool_))
    want = expected(models, [[*t, n] for t, n in zip(texts, (1, 2, 3), strict=True)])
    assert np.abs(step - want).max() < 0.1 * np.ptp(want)


def test_tiled_attention_is_off_for_int8_only(build_folder, monkeypatch):
    """The variable that onnxruntime reads is set while an int8 session opens, and not after."""
    import os

    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession

    def watch(*args, **kwargs):
        seen.append(os.environ.get("ORT_GQA_DISABLE_FLASH_ATTENTION"))
        return real(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    monkeypatch.delenv("ORT_GQA_DISABLE_FLASH_ATTENTION", raising=False)
    folder = build_folder(files={"kv8": FILES["kv8"], "right": FILES["right"]})
    assert EdgeModel(folder, threads=1).precision == "kv8"  # the first
    EdgeModel(folder, precision="right", threads=1)
    assert seen == ["1", None]
    assert "ORT_GQA_DISABLE_FLASH_ATTENTION" not in os.environ


def test_a_token_binds_only_small_inputs(models, monkeypatch):
    """Per token nothing is bound, made or copied again, until the mask has to grow."""
    model = models["right"]
    cache = model.new_cache(1)
    cache.read([[1, 2, 3]])
    cache.step(np.array([1]), np.ones(1, np.bool_))
    binding = cache._bindings[0, 1, True]._binding
    bound = []
    real = binding.bind_input
    monkeypatch.setattr(binding, "bind_input", lambda n, *a: bound.append(n) or real(n, *a))
    monkeypatch.setattr(binding, "bind_output", lambda *a: bound.append("output"))
    monkeypatch.setattr(Session, "new_binding", lambda self: bound.append("binding"))
    one = cache.step(np.array([2]), np.ones(1, np.bool_))
    two = cache.step(np.array([3]), np.ones(1, np.bool_))
    assert bound == []
    assert np.shares_memory(one, two)


@pytest.mark.parametrize("name", ["right", "keepright", "kv8"])
def test_a_text_grows_beyond_its_mask_and_back(models, name, monkeypatch):
    monkeypatch.setattr("gptopt.runtime.shared._COLUMNS", 4)
    text = np.random.default_rng(11).integers(0, 250, size=15).tolist()
    cache, live = models[name].new_cache(), np.ones(1, np.bool_)
    cache.read([text[:2]])
    for back in (3, 9, 0):
        for token in text[cache.columns :]:
            last = cache.step(np.array([token]), live).copy()
        budget = 0.1 if name == "kv8" else BUDGET
        np.testing.assert_allclose(last, expected(models, [text]), atol=budget)
        cache.rewind(back)


@pytest.mark.parametrize("name", ["any", "right", "last", "keep"])
def test_forward_serves_every_form(models, texts, name):
    want, arrays = models["fp32"].forward([texts[2]])
    found, past = models[name].forward([texts[2][:5]])
    rest, past = models[name].forward([texts[2][5:]], past=past)
    np.testing.assert_allclose(np.concatenate([found, rest], 1), want, atol=BUDGET)
    np.testing.assert_allclose(past[1][1], arrays[1][1], atol=1e-5)
    two = np.array([texts[2], texts[2][::-1]])
    want, _ = models["fp32"].forward(two)
    _, past = models[name].forward(two[:, :4])
    np.testing.assert_allclose(
        models[name].forward(two[:, 4:], past=past)[0], want[:, 4:], atol=BUDGET
    )


def test_forward_refuses_padding_that_the_file_does_not_take(models):
    ids = np.array([[0, 0, 5, 6], [1, 2, 3, 4]])
    with pytest.raises(UserError, match="padded on the right only"):
        models["right"].forward(ids, attention_mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    want = alone(models["fp32"], [5, 6])
    found = models["right"].forward([[5, 6, 0, 0]], attention_mask=[[1, 1, 0, 0]])[0]
    np.testing.assert_allclose(found[0, 1], want, atol=BUDGET)


def harm(path, **changes):
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    metadata.update(changes.pop("metadata", {}))
    tensors.update(changes)
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metadata": {"format": "other"}}, CheckFailed, "is no saved cache"),
        ({"metadata": {"model": "0" * 64}}, UserError, "saved by another model or precision"),
        ({"mask": None}, CheckFailed, "its arrays are not those"),
        ({"extra": np.zeros(3)}, CheckFailed, "its arrays are not those"),
        ({"ids": np.full((1, 4), 10**6)}, CheckFailed, "ids that the model does not know"),
        (
            {"ids": np.zeros((1, 5), np.int64)},
            CheckFailed,
            r"is F32 \[1, 2, 4, 8\], expected F32 \[1, 2, 5",
        ),
        ({"mask": np.full((1, 4), 3, np.uint8)}, CheckFailed, "zeros and ones"),
        ({"mask": np.array([[0, 1, 1, 1]], np.uint8)}, CheckFailed, "padded on the right"),
        (
            {"past_key_values.0.key": np.full((1, 2, 4, 8), np.nan, np.float32)},
            CheckFailed,
            "not finite",
        ),
        (
            {"past_key_values.0.key": np.zeros((1, 2, 4, 8), np.float64)},
            CheckFailed,
            r"past_key_values.0.key is F64",
        ),
    ],
)
def test_a_broken_or_foreign_file_is_refused(models, tmp_path, change, error, message):
    cache = models["right"].new_cache(1)
    cache.read([[1, 2, 3, 4]])
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    harm(path, **change)
    with pytest.raises(error, match=message) as caught:
        models["right"].load_cache(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_cache_or_cannot_be_written(models, tmp_path):
    cache = models["right"].new_cache(1)
    cache.read([[1]])
    with pytest.raises(UserError, match="cannot be written"):
        cache.save(tmp_path / "missing" / "cache.safetensors")
    with pytest.raises(UserError, match="no such file"):
        models["right"].load_cache(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckFailed, match="is no saved cache"):
        models["right"].load_cache(tmp_path / "text")
    with pytest.raises(UserError, match="another model"):
        models["any"].generate([[1]], GREEDY, cache=cache)


def test_a_cache_that_the_machine_refuses_is_one_line(models):
    with pytest.raises(UserError, match="GiB, which this machine refuses; read fewer rows"):
        models["right"]._session.zeros((2**20, 2**20, 2**10))


def test_memory_is_taken_as_tokens_come(models):
    """A cache for a long context costs what is in it: 1 GiB here, were it all touched."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("Linux tells how much memory is resident")

    def resident():
        lines = status.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))  # KiB

    before = resident()
    array, address = models["right"]._session.zeros((4, 2**16, 2**10))
    assert array[::2, :: 2**12].sum() == 0
    array[0, 0, :8] = 1
    assert address == array.ctypes.data
    assert address % 64 == 0
    assert resident() - before < 64 * 1024
