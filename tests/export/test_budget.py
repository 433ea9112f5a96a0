"""Mixed formats under a budget: what is foretold is what happens, and limits are kept to."""

import dataclasses
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from random_models import build_of, random_gpt

from gptopt.checkpoint import save_model
from gptopt.config import SamplingOptions
from gptopt.config_export import ExportOptions
from gptopt.errors import UserError
from gptopt.export.budget import Budget, parse_budget
from gptopt.export.calibration import Calibration
from gptopt.export.pipeline import build_graph
from gptopt.export.quality import HeldOut, Quality
from gptopt.export.search import CANDIDATES, Measured, Mix, pareto_front, search
from gptopt.export.targets import PORTABLE
from gptopt.export.verbs import export
from gptopt.kernels.quantization import dequantize, quantize
from gptopt.precisions import Allowed
from gptopt.runtime import EdgeModel
from gptopt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    return random_gpt(block_size=64, vocab_size=320, tie_head=True)


@pytest.fixture(scope="module")
def calibration(model):
    return Calibration(model, np.random.default_rng(0).integers(0, 320, 2048).tolist())


@pytest.fixture(scope="module")
def front(model, calibration):
    return pareto_front(
        build_graph(model, model.config, build_of(model, PORTABLE)).graph, calibration
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("budget")
    random = np.random.default_rng(1)
    words = [f"{first}{second}" for first in "bdfgklmn" for second in "aeiou"]
    (root / "text").write_text(" ".join(random.choice(words, 4000)))
    tokenizer = Tokenizer.train([(root / "text").read_text()], kind="bpe", vocab_size=280)
    (root / "model").mkdir()
    save_model(root / "model", random_gpt(vocab_size=320, block_size=64), tokenizer)
    return root


def test_the_gradients_foretell_the_divergence(model, calibration):
    """Of each matrix rounded alone, within a factor of two, over four orders of magnitude."""
    held = HeldOut(model, np.random.default_rng(5).integers(0, 320, 1000).tolist())
    held.compare(lambda ids: model(torch.from_numpy(ids)).logits[0], Allowed())  # as it is
    found = []
    for name, weight in model.named_parameters():
        if calibration.fisher.outputs.get(name) is None or name == "wte.weight":
            continue
        for bits in (8, 4):
            rounded = dequantize(quantize(weight.detach(), bits=bits, block=32))
            squares = (rounded - weight.detach()).square()
            told = 0.5 * calibration.fisher.outputs[name] @ squares @ calibration.moments(name)
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(rounded)
                quality = held.compare(
                    lambda ids: model(torch.from_numpy(ids)).logits[0], Allowed()
                )
                weight.copy_(kept)
            found.append((float(told), quality.mean_kl))
    told, measured = np.log(np.array(found)).T
    assert np.ptp(measured) > np.log(1000)
    assert np.abs(told - measured).max() < np.log(2.5)
    assert abs((told - measured).mean()) < np.log(1.4)


def test_gradients_are_those_of_the_text_and_leave_the_model_alone(model, calibration):
    assert all(each.requires_grad for each in model.parameters())
    assert all(each.grad is None for each in model.parameters())
    names = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    assert set(calibration.fisher.outputs) == names - {"wpe.weight"}
    assert set(calibration.fisher.lookups) == {"wte.weight", "wpe.weight"}
    assert 0 < calibration.fisher.doubt < 1


def test_a_tied_table_is_quantised_for_both_of_its_uses(model, calibration):
    weight = model.wte.weight.detach()
    held = HeldOut(model, np.random.default_rng(5).integers(0, 320, 1000).tolist())
    said = []
    for hessian in (calibration.hessian("wte.weight"), calibration.table_hessian("wte.weight")):
        blocks = quantize(weight, bits=4, block=32, method="gptq", hessian=hessian)
        changed = random_gpt(block_size=64, vocab_size=320, tie_head=True)
        with torch.no_grad():
            changed.wte.weight.copy_(dequantize(blocks))
            said.append(
                held.compare(
                    lambda ids, model=changed: model(torch.from_numpy(ids)).logits[0], Allowed()
                ).mean_kl
            )
    assert said[1] < 0.9 * said[0]
    assert calibration.table_hessian("blocks.0.attn.qkv.weight") is None


def test_the_front_goes_from_small_to_good(front):
    assert len(front) > 10
    sizes, costs = ([getattr(mix, key) for mix in front] for key in ("bytes", "divergence"))
    assert sizes == sorted(set(sizes))
    assert costs == sorted(costs, reverse=True)
    gains = [-np.diff(costs)[i] / np.diff(sizes)[i] for i in range(len(front) - 1)]
    assert all(a >= b * 0.999 for a, b in itertools.pairwise(gains))
    assert {form.bits for form in front[0].formats.values()} == {2}
    assert {form.bits for form in front[-1].formats.values()} == {8}


def test_a_mix_beats_one_format_for_all(model, calibration, front):
    graph = build_graph(model, model.config, build_of(model, PORTABLE)).graph
    (uniform,) = pareto_front(graph, calibration, [CANDIDATES[3]])
    best = next(mix for mix in front if mix.bytes >= uniform.bytes)
    assert best.bytes < 1.05 * uniform.bytes
    assert best.divergence < 0.9 * uniform.divergence


def built(front, increase):
    """What building a mix would find: files of 1000 bytes more, tokens/s by the bytes."""
    calls = []

    def build(place):
        calls.append(place)
        quality = Quality(
            positions=10, mean_kl=0.0, max_kl=0.0, agreement=1.0,
            perplexity=10 * (1 + increase(place)),
            model_perplexity=10.0, standard_error=0.0, allowed=Allowed(),
        )  # fmt: skip
        size = front[place].bytes
        return Measured(place=place, bytes=size + 1000, quality=quality, tokens_per_s=1e6 / size)

    return build, calls


LINE = [Mix({}, 1000 + 100 * i, 2.0**-i) for i in range(40)]


def test_the_smallest_mix_within_a_perplexity_is_found():
    for shift in (-3, 0, 4):  # what is foretold may be wrong either way
        build, calls = built(LINE, lambda place, shift=shift: 2.0 ** (shift - place))
        found = search(LINE, Budget("ppl", 0.01), build)
        assert 0.003 < 2.0 ** (shift - found.place) <= 0.01
        assert len(calls) <= 7


def test_the_best_mix_within_bytes_or_a_speed_is_found():
    build, calls = built(LINE, lambda place: 0.0)
    assert search(LINE, Budget("bytes", 3550), build).place == 15
    assert len(calls) <= 3
    found = search(LINE, Budget("tokens/s", 400), build)
    assert found.place == 15
    assert found.measured[-1].tokens_per_s >= 400


def test_a_speed_is_measured_and_not_foretold():
    """A token costs more than the bytes that it reads, so a first measurement misleads."""
    front = [Mix({}, size * 10**6, 1 / size) for size in (20, 40, 60, 80, 100)]

    def affine(place):
        return 1000 / (5 + front[place].bytes / 1e7)

    for wanted in (95, 110, 130, 140):
        build, _ = built(front, lambda place: 0.0)
        found = search(
            front, Budget("tokens/s", wanted),
            lambda place, b=build: dataclasses.replace(b(place), tokens_per_s=affine(place)),
        )  # fmt: skip
        assert found.place == max(i for i in range(5) if affine(i) >= wanted)


def test_the_smallest_mix_is_tried_before_a_budget_is_refused():
    build, _ = built(LINE, lambda place: 0.0)

    def cliff(place):
        return dataclasses.replace(build(place), tokens_per_s=900.0 if place else 1100.0)

    assert search(LINE, Budget("tokens/s", 1000), cliff).place == 0


def test_bytes_beside_the_weights_may_differ_from_mix_to_mix():
    build, calls = built(LINE, lambda place: 0.0)

    def uneven(place):
        return dataclasses.replace(build(place), bytes=LINE[place].bytes + 60 * (place % 3))

    found = search(LINE, Budget("bytes", 3010), uneven)
    assert 2800 < uneven(found.place).bytes <= 3010
    assert len(calls) <= 7


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("ppl", 0.01), r"ppl=1%: no mix of formats keeps to it, the nearest has 2%"),
        (Budget("bytes", 1500), "bytes=0.0015MB: no mix .* the nearest has 0.002MB"),
        (Budget("tokens/s", 2000), "tokens/s=2000: no mix .* the nearest has"),
    ],
)
def test_what_cannot_be_kept_to_names_the_nearest(budget, message):
    build, _ = built(LINE, lambda place: 0.02 + 0.01 * (39 - place))
    with pytest.raises(UserError, match=message) as caught:
        search(LINE, budget, build)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [("ppl=1%", "ppl", 0.01), ("bytes=80MB", "bytes", 80e6), ("tokens/s = 300", "tokens/s", 300.0),
     ("bytes=123456", "bytes", 123456.0), ("ppl=.5%", "ppl", 0.005)],
)  # fmt: skip
def test_budgets_are_read(text, kind, limit):
    found = parse_budget(text)
    assert (found.kind, found.limit) == (kind, pytest.approx(limit))


@pytest.mark.parametrize("text", ["ppl=1", "ppl=0%", "bytes=80%", "speed=3", "tokens/s=3MB", ""])
def test_other_budgets_are_one_line(text):
    with pytest.raises(UserError, match=r"expected one of ppl=1%, bytes=80MB, tokens/s=300"):
        parse_budget(text)


def test_an_export_keeps_to_its_budget(root, monkeypatch):
    from gptopt.export import search as module

    monkeypatch.setattr(module, "_TRIES", 3)
    report = export(
        ExportOptions(
            model=str(root / "model"), out=str(root / "edge"), precision="fp32,q4", json=True,
            calibration=str(root / "text"), budget="bytes=60KB",
        )
    )  # fmt: skip
    q4 = report["variants"]["q4"]
    assert 0.8 * 60_000 < report["files"][q4["file"]] <= 60_000
    assert report["variants"]["fp32"]["search"] is None
    told = q4["search"]
    formats = told["formats"].values()
    assert len({tuple(form.values()) for form in formats}) > 1
    assert told["measured"][-1]["mean_kl"] == pytest.approx(q4["quality"]["mean_kl"])
    assert q4["quality"]["allowed"] == dataclasses.asdict(Allowed())
    written = json.loads((root / "edge" / "report.json").read_text())
    assert written["variants"]["q4"]["search"] == told
    card = (root / "edge" / "README.md").read_text()
    assert "The matrices of `q4` were given formats for bytes=0.06MB: " in card
    assert "](front_q4.svg)" in card
    picture = ElementTree.parse(root / "edge" / "front_q4.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 1
    assert len(picture.findall("{*}circle")) == len(told["measured"]) + 1
    edge = EdgeModel(root / "edge", precision="q4", threads=1)
    assert len(edge.generate([[1, 2, 3]], SamplingOptions(max_new_tokens=4), end_ids=())[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32,q8"}, "--precision fp32,q8 leaves nothing to choose; ask for q4"),
        ({"precision": "q4"}, "needs a text to find what matters; give --calibration TEXT"),
    ],
)
def test_a_budget_needs_something_to_choose_and_a_text(root, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(
            ExportOptions(
                model=str(root / "model"), out=str(tmp_path / "x"), budget="ppl=1%", **options
            )
        )
