"""The two forms of the cache say the same, and the decode step can become a CUDA graph."""

import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptopt import decoders
from gptopt.config import SamplingOptions
from gptopt.decoders import StaticDecoder, TorchDecoder
from gptopt.generate import generate_tokens
from gptopt.kernels import StaticCache
from gptopt.runtime.generation import complete

PROMPTS = [[5, 9, 200, 31, 7], [3], [8, 100, 2, 2, 290, 17, 33, 4, 60, 61, 62]]
GREEDY = SamplingOptions(temperature=0, max_new_tokens=30)
MODELS = {
    "learned": {},
    "llama": {"position": "rotary", "n_kv_head": 1, "norm": "rmsnorm", "activation": "swiglu"},
    "alibi": {"position": "alibi", "n_head": 4, "n_kv_head": 2},
    "window": {"position": "none", "window": 5},
    "softcap": {"position": "rotary", "attn_softcap": 2.0, "qk_norm": True, "window": 7},
    "post": {"position": "sinusoidal", "norm_position": "post"},
}


def recorded(form, model, prompts=PROMPTS, sampling=GREEDY, context="slide"):
    """The tokens of each row, and every step's scores of the rows that were not finished."""

    class Recorder(form):
        steps: list = []

        def prefill(self, ids, mask):
            scores = super().prefill(ids, mask)
            self.steps.append(scores.double().clone())
            return scores

        def decode(self, ids, mask):
            scores = super().decode(ids, mask)
            self.steps.append(scores.double()[torch.from_numpy(mask[:, -1])].clone())
            return scores

    with torch.no_grad():
        done = complete(Recorder(model, None), prompts, sampling, context=context)
    return [row.tokens for row in done.rows], Recorder.steps


def share_of_budget(found, same, exact):
    """The largest error of a step as a share of what the one rule allows in float32."""
    shares = []
    for a, s, e in zip(found, same, exact, strict=True):
        budget = max(2 * (s - e).abs().max().item(), 2e-5 * (e.max() - e.min()).item())
        shares.append((a - e).abs().max().item() / budget)
    return max(shares)


@pytest.mark.parametrize("name", MODELS)
def test_both_cache_forms_say_the_same_tokens_and_scores(make_model, name):
    model = make_model(**MODELS[name])
    tokens, found = recorded(StaticDecoder, model)
    same_tokens, same = recorded(TorchDecoder, model)
    exact_tokens, exact = recorded(TorchDecoder, make_model(**MODELS[name]).double())
    assert tokens == same_tokens == exact_tokens
    assert len({token for row in tokens for token in row}) > 20
    assert len(found) == max(map(len, tokens)) == 30
    assert share_of_budget(found, same, exact) <= 1.0


def test_a_cache_that_misses_a_layer_is_noticed(make_model, monkeypatch):
    fill = decoders._fill
    monkeypatch.setattr(
        decoders, "_fill", lambda cache, present, mask: fill(cache, present[:1], mask)
    )
    _, found = recorded(StaticDecoder, make_model())
    _, same = recorded(TorchDecoder, make_model())
    assert (found[1] - same[1]).abs().max() > 1e-2


def test_a_full_row_stops_and_the_others_go_on(make_model):
    """A row that ends at the context's edge has no slot left, and its neighbours still decode."""
    model = make_model(position="rotary")
    prompts = [PROMPTS[1], [*PROMPTS[2], 7, 7, 7, 7]]
    tokens, _ = recorded(StaticDecoder, model, prompts, context="error")
    assert tokens == recorded(TorchDecoder, model, prompts, context="error")[0]
    assert list(map(len, tokens)) == [16, 2]


def test_a_batch_of_another_size_gets_a_cache_of_its_own(make_model):
    model = make_model()
    decoder = StaticDecoder(model, None)
    with torch.no_grad():
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
            done = complete(decoder, prompts, GREEDY, context="slide")
            assert [row.tokens for row in done.rows] == recorded(TorchDecoder, model, prompts)[0]


def test_the_model_reads_several_tokens_behind_each_row(make_model):
    model = make_model(position="rotary", n_kv_head=1)
    config = model.config
    cache = StaticCache(2, 2, config.kv_heads, 16, config.head_size)
    ids = torch.randint(0, 320, (2, 9))
    with torch.no_grad():
        for T in (4, 1, 3):
            start = int(cache.lengths[0])
            found = model(ids[:, start : start + T], past=cache)
            cache.advance(T)
            assert found.present is None
            expected = model(ids[:, : start + T]).logits[:, start:]
            torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "M", "message"),
    [
        ({"attention_mask": torch.ones(1, 2)}, 16, "a StaticCache goes without attention_mask"),
        ({"use_cache": True}, 16, "a StaticCache goes without"),
        ({}, 17, "rows of 17 tokens are beyond block_size=16"),
    ],
)
def test_what_does_not_go_with_a_static_cache_is_refused(make_model, more, M, message):
    with pytest.raises(ValueError, match=message):
        make_model()(torch.zeros(1, 2, dtype=torch.int64), past=StaticCache(2, 1, 2, M, 8), **more)


class NoSync(TorchDispatchMode):
    """Fails where the host would read a value from the device, or a size would depend on one."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert torch.Tag.data_dependent_output not in function.tags, function
        assert torch.Tag.dynamic_output_shape not in function.tags, function
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_a_step_waits_for_the_device(make_model, name):
    decoder = StaticDecoder(make_model(**MODELS[name]), None)
    ids, mask = np.array([[1, 2], [3, 4]]), np.ones((2, 2), dtype=np.bool_)
    with torch.no_grad():
        decoder.prefill(ids, mask)
        with NoSync():
            decoder.decode(ids[:, 1:], np.ones((2, 3), dtype=np.bool_))
        with pytest.raises(AssertionError), NoSync():
            bool(torch.ones(2).all())


class FakeGraph:
    """What torch.cuda.CUDAGraph does, by running the step again into the captured result."""

    captured = 0

    def replay(self):
        step = self.step
        step._scores.copy_(step._run())


@pytest.fixture
def fake_cuda(monkeypatch):
    """The calls around a capture, on a machine that has no GPU."""

    class Stream:
        def wait_stream(self, other):
            pass

    def graph(target, **_):
        FakeGraph.captured += 1
        return nullcontext()

    FakeGraph.captured = 0
    main, streams = Stream(), []
    for name, value in {
        "device": lambda device: nullcontext(),
        "Stream": Stream,
        "current_stream": lambda device: main,
        "set_stream": streams.append,
        "synchronize": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    init = decoders._Step.__init__

    def capturing(self, *arguments):
        init(self, *arguments)
        self.capture = True
        FakeGraph.step = self

    monkeypatch.setattr(decoders._Step, "__init__", capturing)
    return main, streams


def test_the_step_is_captured_once_per_batch_size_and_replayed(make_model, fake_cuda):
    model = make_model(position="rotary")
    tokens, _ = recorded(StaticDecoder, model)  # slides: several prefills, one capture
    assert tokens == recorded(TorchDecoder, model)[0]
    assert FakeGraph.captured == 1


def test_a_step_that_cannot_be_captured_runs_plainly_and_says_so_once(
    make_model, fake_cuda, monkeypatch, caplog
):
    def refuse(target, **_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    model = make_model()
    with caplog.at_level(logging.WARNING, logger="gptopt.decoders"):
        tokens, _ = recorded(StaticDecoder, model)
    assert tokens == recorded(TorchDecoder, model)[0]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "cannot be captured as a CUDA graph" in said
    assert said.endswith("operation not permitted when stream is capturing")
    main, streams = fake_cuda
    assert streams == [main], "the stream of the capture is still current"


def test_the_static_cache_is_the_gpus_and_can_be_asked_for(make_model, monkeypatch):
    made = []
    init = StaticDecoder.__init__
    monkeypatch.setattr(
        StaticDecoder, "__init__", lambda self, *args: made.append(self) or init(self, *args)
    )
    model = make_model()
    expected = generate_tokens(model, PROMPTS, GREEDY, context="slide")
    assert not made
    found = generate_tokens(model, PROMPTS, GREEDY, context="slide", static_cache=True)
    assert made
    assert [row.tokens for row in found.rows] == [row.tokens for row in expected.rows]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_replays_a_graph_that_says_what_the_cpu_says(make_model, name, monkeypatch):
    model = make_model(**MODELS[name])
    expected, exact = recorded(TorchDecoder, make_model(**MODELS[name]).double())
    tokens, found = recorded(StaticDecoder, model.cuda())
    assert tokens == expected
    for a, e in zip(found, exact, strict=True):
        assert (a.cpu() - e).abs().max() < 1e-3 * (e.max() - e.min())
    decoder = StaticDecoder(model, None)
    ids, mask = np.array([[1, 2], [3, 4]]), np.ones((2, 2), dtype=np.bool_)
    with torch.no_grad():
        decoder.prefill(ids, mask)
        decoder.decode(ids[:, 1:], np.ones((2, 3), dtype=np.bool_))
        assert decoder._step is not None
        assert decoder._step._graph is not None, "the step was not captured"
        monkeypatch.setattr(decoder._step, "_run", lambda: pytest.fail("not replayed"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.decode(ids[:, 1:], np.ones((2, 4), dtype=np.bool_))
        finally:
            torch.cuda.set_sync_debug_mode("default")
