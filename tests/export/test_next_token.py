"""The next token as an output of the graph: greedy as PyTorch's, drawn as its distribution says."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from random_models import random_gpt

from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.export import export_model, prove
from gptopt.export.next_token import add_next_token, noise_of
from gptopt.export.notes import Notes
from gptopt.export.package import Plan
from gptopt.export.targets import LEGACY, ORT_CPU, PORTABLE, STANDARD
from gptopt.precisions import PRECISIONS
from gptopt.runtime import EdgeModel
from gptopt.runtime.sampling import probabilities

V = 12
NAMES = ("seed", "temperature", "top_k", "top_p")


def facts(target, tokens):
    return target.facts("onnx/model.onnx").model_copy(update={"tokens": tokens})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(model, folder, report) of a GPT-2 whose graph also draws, vocabulary padded by 48."""
    model = random_gpt(tie_head=True)
    path = tmp_path_factory.mktemp("tokens") / "edge"
    plan = Plan([PRECISIONS["fp32"], PRECISIONS["q8"]], tokens="sample")
    return model, path, export_model(model, None, path, plan=plan)


def test_the_runtime_draws_from_the_scores_as_without_that_output(folder, tmp_path):
    model, path, _ = folder
    export_model(model, None, tmp_path / "plain")
    options = SamplingOptions(max_new_tokens=24, temperature=1.5, min_p=0.01, seed=7)
    said, wanted = (
        EdgeModel(each, threads=1).generate([[5, 17], [900]], options)
        for each in (path, tmp_path / "plain")
    )
    assert said == wanted
    assert len({*said[0], *said[1]}) > 24


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_each_file_is_proven_to_choose_from_its_scores(folder):
    _, path, report = folder
    for name in ("fp32", "q8"):
        chosen = report["variants"][name]["next_tokens"]
        assert chosen["tokens"] == 4 * (3 + 3 + 1 + 1)
        assert chosen["agreeing"] + chosen["near_ties"] == chosen["tokens"]
        assert chosen["near_ties"] <= 1
    assert EdgeModel(path).file.tokens == "sample"


def play(session, prompt, steps, parts=(), **options):
    """Tokens of a client that feeds next_tokens back as they come."""
    feeds = {name: np.array([each], _DTYPES[name]) for name, each in options.items()}
    past = [x.name for x in session.get_inputs() if x.name.startswith("past")]
    outputs = ["next_tokens", *(name.replace("past_key_values", "present") for name in past)]
    cache = [np.zeros((1, 4, 0, 8), np.float32)] * len(past)
    said, length, chosen = [], 0, None
    pieces = np.split(np.array([prompt]), np.cumsum(parts)[: len(parts)], axis=1)
    while len(said) < steps:
        ids = pieces.pop(0) if pieces else chosen
        feeds |= {
            "input_ids": ids,
            "attention_mask": np.ones((1, length + ids.shape[1]), np.int64),
            "position_ids": length + np.arange(ids.shape[1])[None],
            **dict(zip(past, cache, strict=True)),
        }
        chosen, *cache = session.run(outputs, feeds)
        length += ids.shape[1]
        if not pieces:
            said.append(int(chosen[0, 0]))
    return said


_DTYPES = dict(zip(NAMES, (np.int64, np.float32, np.int64, np.float32), strict=True))


@torch.no_grad()
def test_greedy_tokens_are_those_of_pytorch(folder):
    model, path, _ = folder
    text = [5, 6, 7]
    wanted = []
    for _ in range(24):
        wanted.append(int(model(torch.tensor([text + wanted])).logits[0, -1].argmax()))
    session = session_of(path / "onnx/model.onnx")
    assert play(session, text, 24, temperature=0) == wanted


def test_a_seed_draws_the_same_tokens_however_the_prompt_is_fed(folder):
    session = session_of(folder[1] / "onnx/model.onnx")
    prompt = [5, 6, 7, 8, 9, 10]
    first = play(session, prompt, 12, seed=3)
    assert play(session, prompt, 12, seed=3) == first
    assert play(session, prompt, 12, parts=(1, 3), seed=3) == first
    assert play(session, prompt, 12, seed=4) != first
    assert len(set(first)) > 6


def test_clients_that_know_nothing_of_it_see_one_more_output(folder):
    model, path, _ = folder
    assert {x.name for x in session_of(path / "onnx/model.onnx").get_inputs()} == {
        "input_ids", "attention_mask", "position_ids",
        *(f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")),
    }  # fmt: skip
    prompts = [[5, 6, 7], [9]]
    greedy = SamplingOptions(temperature=0, max_new_tokens=6)
    with torch.no_grad():
        wanted = [int(model(torch.tensor([each])).logits[0, -1].argmax()) for each in prompts]
    said = EdgeModel(path, precision="fp32").generate(prompts, greedy, end_ids=())
    assert [row[0] for row in said] == wanted


@pytest.mark.parametrize("target", [ORT_CPU, STANDARD, LEGACY], ids=lambda each: each.name)
@pytest.mark.parametrize("tokens", ["greedy", "sample"])
def test_every_form_of_the_cache_can_choose(target, tokens, export, tmp_path):
    model = random_gpt(n_layer=1)
    path, build = export(model, target, told=True)
    graph = add_next_token(ir.load(path), tokens, 2000, Notes())
    ir.save(graph, tmp_path / "model.onnx")
    file = facts(build.target, tokens)
    proof = prove(
        tmp_path / "model.onnx", model, vocab_size=2000, file=file, cases=["next token", "decode"]
    )
    assert proof.passed, proof.failure
    assert proof.next_tokens.tokens >= 5
    shorter = prove(tmp_path / "model.onnx", model, vocab_size=40, file=file, cases=["next token"])
    assert shorter.failure.startswith("next_tokens, right padding: row 0 chose")
    assert shorter.failure.endswith("of 40")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """A graph whose scores are rows of a table, and the table (3, V)."""
    table = np.random.default_rng(0).normal(0, 1.5, (3, V)).astype(np.float32)
    shape = ir.Shape(["batch_size", "sequence_length"])
    given = [
        ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT64))
        for name in ("input_ids", "attention_mask", "position_ids")
    ]
    weight = ir.Value(
        name="table", shape=ir.Shape([3, V]), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(table, name="table"),
    )  # fmt: skip
    node = ir.node("Gather", [weight, given[0]])
    logits = node.outputs[0]
    logits.name = "logits"
    logits.shape = ir.Shape(["batch_size", "sequence_length", V])
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        given, [logits], nodes=[node], initializers=[weight], opset_imports={"": 17}, name="g"
    )
    path = tmp_path_factory.mktemp("sampler") / "model.onnx"
    ir.save(add_next_token(ir.Model(graph, ir_version=8), "sample", None, Notes()), path)
    return session_of(path), table


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.4, 0, 0.8), (1.0, 7, 0.6)]
)
def test_tokens_are_drawn_as_often_as_they_should(sampler, temperature, top_k, top_p):
    session, table = sampler
    rows, steps = 2000, 8
    ids = np.arange(rows * steps).reshape(rows, steps)[:, :1] % 3
    counts = np.zeros((3, V))
    for position in range(steps):
        feeds = {
            "input_ids": ids, "attention_mask": np.ones((rows, 1), np.int64),
            "position_ids": np.full((rows, 1), position), "seed": np.array([11]),
            "temperature": np.array([temperature], np.float32),
            "top_k": np.array([top_k]), "top_p": np.array([top_p], np.float32),
        }  # fmt: skip
        (chosen,) = session.run(["next_tokens"], feeds)
        np.add.at(counts, (ids[:, 0], chosen[:, 0]), 1)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = probabilities(table, options) * counts.sum(axis=1, keepdims=True)
    allowed = expected > 0
    assert (counts[~allowed] == 0).all()
    chi = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    free = allowed.sum() - 3
    assert chi < free + 4 * np.sqrt(2 * free)  # 4 deviations


def test_noise_is_gumbel_and_unrelated_between_its_arguments():
    """Along each argument alone, where the others stand still."""
    n = 60_000
    for arguments in (
        (0, np.arange(n), 0, 0), (0, 0, np.arange(n), 0), (0, 0, 0, np.arange(n)),
        (5, np.arange(300)[:, None], 2, np.arange(200)),
    ):  # fmt: skip
        noise = noise_of(*arguments).ravel()
        u = np.exp(-np.exp(-noise.astype(np.float64)))
        counts, _ = np.histogram(u, 64, (0, 1))
        chi = ((counts - n / 64) ** 2 / (n / 64)).sum()
        assert chi < 63 + 5 * np.sqrt(2 * 63)
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / np.sqrt(n)
    assert noise_of(0, 0, 0, 1) != noise_of(1, 0, 0, 1)
    assert noise_of(0, 1, 0, 0) != noise_of(0, 0, 1, 0)


def test_a_masked_model_is_refused(tmp_path):
    model = random_gpt(causal=False, n_layer=1)
    with pytest.raises(
        UserError, match="--tokens greedy: only a next-token model has a next token"
    ):
        export_model(model, None, tmp_path / "edge", target=PORTABLE, plan=Plan(tokens="greedy"))
    assert not (tmp_path / "edge").exists()
