"""LoRA adapters of an exported folder: room in the graph, their files, their proof, the switch."""

import copy
import json

import numpy as np
import pytest
import torch
from random_models import random_gpt

from gptopt.checkpoint import load_model, save_model
from gptopt.config import LoraOptions, SamplingOptions
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.adapters import adapters_of, add_slots
from gptopt.export.notes import Notes
from gptopt.export.pipeline import Build, build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.stream import open_graph
from gptopt.export.targets import TARGETS
from gptopt.export.validate import prove
from gptopt.export.verbs import export, validate
from gptopt.export.write import save
from gptopt.lora import begin, lora_parameters
from gptopt.precisions import PRECISIONS
from gptopt.runtime import EdgeModel

LLAMA = {
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "bias": False,
}  # fmt: skip
SIZES = {"n_head": 2, "n_embd": 16, "vocab_size": 320, "block_size": 24}
IDS = np.arange(14).reshape(2, 7) * 13 % 320


def write_adapter(root, base, name, targets, rank):
    start = load_model(root / base).model
    model = begin(copy.deepcopy(start), LoraOptions(rank=rank, targets=targets), start, root / base)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    (root / name).mkdir()
    save_model(root / name, model, None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two bases with two adapters each, of other layers and ranks."""
    root = tmp_path_factory.mktemp("adapters")
    for base, options in (("gpt2", {}), ("llama", LLAMA)):
        (root / base).mkdir()
        save_model(root / base, random_gpt(**SIZES, **options), None)
        write_adapter(root, base, f"{base}-one", "attention", 2)
        write_adapter(root, base, f"{base}-two", "ffn,attn.c_proj" if base == "gpt2" else "ffn", 3)
    return root


@pytest.fixture(scope="module")
def folder(root):
    """An exported folder that carries both, and its report."""
    report = export(
        ExportOptions(
            model=str(root / "gpt2"), out=str(root / "edge"), precision="fp32,q4",
            adapter=f"one={root / 'gpt2-one'}, two={root / 'gpt2-two'}", json=True,
        )
    )  # fmt: skip
    return root / "edge", report


@pytest.fixture(scope="module")
def build_of(root):
    """Builds of the two bases, each recorded once."""
    programs = {}

    def build(base, target, model):
        made = Build(TARGETS[target], program=programs.get(base))
        graph = build_graph(model, model.config, made)
        programs[base] = made.program
        return graph, made

    return build


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def run(session):
    mask, positions = np.ones(IDS.shape, bool), np.tile(np.arange(IDS.shape[1]), (2, 1))
    return session.run(IDS, mask, positions, [])[0]


@pytest.mark.parametrize(
    ("base", "target", "precision"),
    [
        ("gpt2", "portable", "fp32"), ("gpt2", "portable", "q8"), ("gpt2", "ort-cpu", "q4"),
        ("llama", "portable", "fp16"), ("llama", "ort-cpu", "fp32"),
        ("llama", "standard-growing", "fp32"), ("gpt2", "legacy", "fp32"),
    ],
)  # fmt: skip
def test_room_for_adapters_changes_no_bit_of_the_base(
    root, build_of, tmp_path, base, target, precision
):
    model = load_model(root / base).model
    adapters = adapters_of(f"a={root / base}-one,b={root / base}-two", model)
    (graph, build), form = build_of(base, target, model), PRECISIONS[precision]
    if precision != "fp32":
        graph = quantize_graph(graph, form, build.notes)
    wide = add_slots(graph, adapters, build.notes)
    file = build.target.facts("onnx/model.onnx", form.floats)
    sessions = []
    for name, each in (("plain", graph), ("wide", wide)):
        save(each, tmp_path / f"{name}.onnx", external=False)
        sessions.append(open_graph(tmp_path / f"{name}.onnx", model.config, file))
    plain, before = sessions[0], run(sessions[0])
    assert not plain.slots
    session = sessions[1]
    assert np.array_equal(run(session), before)
    for each in adapters:
        narrow = {n: m.astype(session.slots.dtype) for n, m in each.matrices.items()}
        session.adapter = session.prepare(narrow)
        said, spread = run(session), np.ptp(before)
        assert np.abs(said - before).max() > 0.1 * spread
        if precision == "fp32":  # what the proof allows the others depends on their rounding
            assert np.abs(said - logits_of(each.on(model))).max() <= 2e-5 * spread
    session.adapter = None
    assert np.array_equal(run(session), before)


def test_each_adapter_is_proven_in_each_file(folder):
    path, report = folder
    assert list(report["variants"]) == ["fp32", "q4"]
    for variant in report["variants"].values():
        assert list(variant["adapters"]) == ["one", "two"]
        for proof in variant["adapters"].values():
            assert proof["passed"] is True
            assert {case["case"] for case in proof["cases"]} >= {"prefill", "decode", "greedy"}
    files = {each.name for each in (path / "onnx").iterdir()}
    assert {"one.onnx_adapter", "two.onnx_adapter"} <= files
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert "onnx/two.onnx_adapter" in listed
    assert "| `two` | q4 |" in (path / "README.md").read_text()


def test_the_proof_fails_without_the_adapter_and_with_another_one(root, folder, tmp_path):
    path, _ = folder
    model = load_model(root / "gpt2").model
    one, two = adapters_of(f"one={root / 'gpt2-one'},two={root / 'gpt2-two'}", model)
    graph = path / "onnx" / "model.onnx"
    cases = ("prefill", "greedy")
    assert prove(graph, one.on(model), cases=cases, adapter="one").passed
    assert prove(graph, model, cases=cases).passed
    for adapted, name in ((one, None), (one, "two"), (two, "one")):
        assert not prove(graph, adapted.on(model), cases=cases, adapter=name).passed
    assert not prove(graph, model, cases=cases, adapter="one").passed


def test_validate_proves_adapters_again(root, folder):
    path, _ = folder
    given = {"folder": str(path), "precision": "fp32", "model": str(root / "gpt2"), "json": True}
    result = validate(ValidateOptions(adapter=f"two={root / 'gpt2-two'}", **given))
    assert list(result["variants"]["fp32"]["adapters"]) == ["two"]
    with pytest.raises(CheckFailed, match="does not say with adapter two"):
        validate(ValidateOptions(adapter=f"two={root / 'gpt2-one'}", **given))
    with pytest.raises(UserError, match="carries one, two"):
        validate(ValidateOptions(adapter=f"three={root / 'gpt2-one'}", **given))


def test_an_adapter_given_as_the_model_is_merged(root, tmp_path):
    report = export(
        ExportOptions(model=str(root / "gpt2-two"), out=str(tmp_path / "merged"), json=True)
    )
    assert report["passed"]
    assert report["adapters"] == {}
    expected = logits_of(load_model(root / "gpt2-two").model)
    model = EdgeModel(tmp_path / "merged")
    assert np.abs(model.forward(IDS)[0] - expected).max() <= 2e-5 * np.ptp(expected)


def test_adapters_switch_between_calls(root, folder):
    model = EdgeModel(folder[0], adapter="one")
    assert (model.adapters, model.adapter) == (["one", "two"], "one")
    greedy = SamplingOptions(temperature=0, max_new_tokens=5)
    said = {}
    for name in ("one", None, "two", "one", None):
        model.use_adapter(name)
        place = "gpt2" if name is None else f"gpt2-{name}"
        expected = logits_of(load_model(root / place).model)
        assert np.abs(model.forward(IDS)[0] - expected).max() <= 2e-5 * np.ptp(expected)
        tokens = model.generate(IDS.tolist(), greedy, end_ids=())  # the shared cache's own path
        assert said.setdefault(name, tokens) == tokens
        best = load_model(root / place).model(torch.tensor(IDS)).logits[:, -1].argmax(-1)
        assert [row[0] for row in tokens] == best.tolist()
    assert len({str(tokens) for tokens in said.values()}) == 3


def test_a_cache_goes_on_with_its_own_adapter_only(folder, tmp_path):
    model = EdgeModel(folder[0])
    cache = model.new_cache()
    cache.read([IDS[0].tolist()])
    cache.save(tmp_path / "base.cache")
    model.use_adapter("one")
    with pytest.raises(UserError, match="read with another adapter"):
        cache.read([[5]])
    with pytest.raises(UserError, match="read with another adapter"):
        cache.step(np.array([5]), np.array([True]))
    with pytest.raises(UserError, match="saved by another model"):
        model.load_cache(tmp_path / "base.cache")
    own = model.new_cache()
    scores = own.read([IDS[0].tolist()])
    own.save(tmp_path / "one.cache")
    model.use_adapter(None)
    cache.read([[5]])  # as before
    cache.rewind(0)
    model.use_adapter("one")
    assert np.array_equal(cache.read([IDS[0].tolist()]), scores)  # nothing of the base is left
    assert model.load_cache(tmp_path / "one.cache").lengths == [7]


def test_onnxruntime_itself_switches_the_files(root, folder):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(folder[0] / "onnx" / "model.onnx"), options)
    feeds = {
        "input_ids": IDS, "attention_mask": np.ones_like(IDS),
        "position_ids": np.tile(np.arange(7), (2, 1)),
    }  # fmt: skip
    assert {item.name for item in session.get_inputs()} - feeds.keys() == {
        f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")
    }
    for item in session.get_inputs()[3:]:
        feeds[item.name] = np.zeros((2, 2, 0, 8), np.float32)
    active = ort.RunOptions()
    adapter = ort.LoraAdapter()
    adapter.Load(str(folder[0] / "onnx" / "two.onnx_adapter"))
    active.add_active_adapter(adapter)
    expected = logits_of(load_model(root / "gpt2-two").model)
    said = session.run(["logits"], feeds, active)[0]
    assert np.abs(said - expected).max() <= 2e-5 * np.ptp(expected)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("gpt2-one", "expected NAME=FOLDER"),
        ("a={root}/gpt2-one,a={root}/gpt2-two", "each name once"),
        ("a={root}/gpt2-one,A={root}/gpt2-two", "whatever its capitals"),
        ("a b={root}/gpt2-one", "is no name for one"),
        ("Con={root}/gpt2-one", "no device of Windows"),
        ("x_fp16={root}/gpt2-one", "is no name for one"),
        ("a={root}/gpt2", "holds a whole model"),
        ("a={root}/nowhere", "no such folder"),
        ("a={root}/llama-one", "was trained on another base"),
    ],
)
def test_wrong_adapters_are_one_clear_line_and_leave_nothing(root, tmp_path, adapter, said):
    given = adapter.format(root=root)
    with pytest.raises(UserError, match=said) as caught:
        export(ExportOptions(model=str(root / "gpt2"), out=str(tmp_path / "x"), adapter=given))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_target_whose_clients_cannot_switch_says_so(root, tmp_path):
    with pytest.raises(UserError, match="merge one with gptopt merge"):
        export(
            ExportOptions(
                model=str(root / "gpt2"), out=str(tmp_path / "x"), target="web",
                adapter=f"a={root / 'gpt2-one'}",
            )
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_a_layer_without_a_product_of_its_own_is_told(root, build_of):
    model = load_model(root / "gpt2").model
    (one,) = adapters_of(f"one={root / 'gpt2-one'}", model)
    graph, _ = build_of("gpt2", "portable", model)
    for value in list(graph.graph.initializers.values()):
        if value.name == "blocks.1.attn.proj.weight":
            value.name = "fused"
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.proj is no product of its own"):
        add_slots(graph, [one], Notes())
