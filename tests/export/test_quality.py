"""What a file makes of held-out text: measured right, held to what is allowed, told everywhere."""

import json

import numpy as np
import pytest
import torch
from random_models import build_of, random_gpt

from gptopt.checkpoint import save_model
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.pipeline import build_graph
from gptopt.export.quality import HeldOut
from gptopt.export.targets import PORTABLE
from gptopt.export.texts import split
from gptopt.export.verbs import export, validate
from gptopt.export.write import save
from gptopt.precisions import Allowed, allowed_of
from gptopt.runtime.variants import EdgeFile
from gptopt.tokenizer import Tokenizer

ANYTHING = Allowed()
WORDS = [f"{first}{second}" for first in "bdfgklmn" for second in "aeiou"]


@pytest.fixture(scope="module")
def model():
    return random_gpt(block_size=64, vocab_size=320)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 320, 1000).tolist()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("quality") / "model.onnx"
    save(build_graph(model, model.config, build_of(model, PORTABLE)), path, external=False)
    return path


def text(seed, words):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model folder and two texts."""
    root = tmp_path_factory.mktemp("texts")
    tokenizer = Tokenizer.train([text(0, 400)], kind="bpe", vocab_size=280)
    (root / "model").mkdir()
    save_model(root / "model", random_gpt(vocab_size=320, block_size=32), tokenizer)
    (root / "text").write_text(text(1, 3000))
    (root / "other").write_text(text(2, 1000))
    return root


def disturbed(model, size):
    """Logits of the model with noise, and the figures that follow from them, by hand."""
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def run(ids):
        logits = model(torch.from_numpy(ids)).logits[0]
        return logits + size * torch.randn(logits.shape, generator=generator)

    return run


def test_the_figures_are_those_of_their_definitions(model, ids):
    held = HeldOut(model, ids)
    found = held.compare(disturbed(model, 0.5), ANYTHING)
    run, divergences, losses, same = disturbed(model, 0.5), [], [], []
    for start in [64 * n for n in range(15)]:
        window = np.array([ids[start : start + 64]])
        ours = run(window)[:-1].double()
        with torch.no_grad():
            theirs = model(torch.from_numpy(window)).logits[0, :-1].double()
        divergences.append(
            torch.nn.functional.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        )
        target = torch.tensor(window[0, 1:])
        losses.append(torch.nn.functional.cross_entropy(ours, target, reduction="none"))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    assert found.positions == 15 * 63
    assert found.mean_kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert found.max_kl == pytest.approx(float(torch.cat(divergences).max()), rel=1e-4)
    assert found.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert found.agreement == pytest.approx(float(torch.cat(same).double().mean()))
    assert 0.1 < found.agreement < 0.99


def test_a_file_of_float32_costs_nothing(model, path, ids):
    found = HeldOut(model, ids).measure(path, EdgeFile(cache="shared"), allowed_of("fp32", None))
    assert found.failure is None
    assert found.mean_kl < 1e-7
    assert abs(found.increase) < 1e-5


def test_a_cache_is_read_while_it_is_measured(model, path, ids, monkeypatch):
    from gptopt.export import quality

    fed = []
    run = quality.Growing

    class Watched(run):
        def __init__(self, session):
            super().__init__(session)
            plain = self.run

            def watched(ids, mask, places, past):
                fed.append((ids.shape[1], len(past) > 0))
                return plain(ids, mask, places, past)

            self.run = watched

    monkeypatch.setattr(quality, "Growing", Watched)
    HeldOut(model, ids).measure(path, EdgeFile(cache="shared"), ANYTHING)
    assert set(fed) == {(32, False), (32, True)}


def test_a_bidirectional_model_has_no_perplexity(ids):
    model = random_gpt(block_size=64, vocab_size=320, causal=False)
    found = HeldOut(model, ids).compare(disturbed(model, 0.5), ANYTHING)
    assert (found.perplexity, found.increase, found.failure) == (None, None, None)
    assert found.mean_kl > 0.01
    assert found.positions == 15 * 64


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (Allowed(perplexity=0.01), r"perplexity .* is .*% above the model's .*, 1.00% allowed"),
        (Allowed(mean_kl=0.01), r"mean KL divergence .*, 0.01 allowed"),
        (Allowed(agreement=0.99), r"likeliest tokens are the model's, at least 99.0% expected"),
    ],
)
def test_each_figure_can_fail(model, allowed, message):
    # A text that the model itself would write, so that noise makes it less likely.
    with torch.no_grad():
        said = [int(torch.randint(320, (1,)))]
        generator = torch.Generator().manual_seed(3)
        while len(said) < 256:
            logits = model(torch.tensor([said[-64:]])).logits[0, -1]
            said.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    found = HeldOut(model, said).compare(disturbed(model, 1.0), allowed)
    import re

    assert re.search(message, found.failure)
    assert "\n" not in found.failure


def test_large_vocabularies_read_fewer_windows(ids):
    model = random_gpt(block_size=64, vocab_size=2**18, n_embd=8, n_head=1, n_layer=1)
    assert len(HeldOut(model, ids)._windows) == 2**26 // 2**18 // 64


def test_a_text_is_split_without_overlap_and_all_over():
    used, held = split(list(range(4000)))
    assert sorted(used + held) == list(range(4000))
    assert len(held) == 1000
    assert min(held) < 500
    assert max(held) == 3999


def test_an_export_tells_how_good_its_files_are(root, capsys, monkeypatch):
    from gptopt.export import package

    # The weights are random, and suffer more than those of a trained model.
    monkeypatch.setattr(package, "allowed_of", lambda *_: Allowed(mean_kl=0.5))
    out = root / "edge"
    report = export(
        ExportOptions(
            model=str(root / "model"), out=str(out), precision="fp32,q8,q4", json=True,
            calibration=str(root / "text"), held_out=str(root / "other"),
        )
    )  # fmt: skip
    errors = [report["variants"][name]["quality"]["mean_kl"] for name in ("fp32", "q8", "q4")]
    assert errors == sorted(errors)
    assert report["variants"]["q4"]["quality"]["allowed"]["mean_kl"] == 0.5
    card = (out / "README.md").read_text()
    assert "## How good it is" in card
    assert "| `q4` | " in card
    assert json.loads((out / "report.json").read_text())["quality"]["passed"]
    capsys.readouterr()
    result = validate(
        ValidateOptions(folder=str(out), model=str(root / "model"), held_out=str(root / "other"))
    )
    found = result["variants"]["q4"]["quality"]
    assert found == report["variants"]["q4"]["quality"]
    assert capsys.readouterr().out.count("held-out text: perplexity") == 3


def test_a_file_that_loses_too_much_leaves_no_folder(root, monkeypatch, tmp_path):
    from gptopt.export import package

    monkeypatch.setattr(package, "allowed_of", lambda *_: Allowed(mean_kl=1e-9))
    with pytest.raises(CheckFailed, match=r"not written, q4 loses too much .* more bits; see "):
        export(
            ExportOptions(
                model=str(root / "model"), out=str(tmp_path / "edge"), precision="q4",
                held_out=str(root / "other"), json=True,
            )
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["edge.failed-report.json"]


def test_texts_that_do_not_do_are_one_line(root, tmp_path):
    short = tmp_path / "short"
    short.write_text("too short")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\xff\xfe")
    for options, message in [
        ({"calibration": str(short)}, r"--calibration .*short: \d tokens, expected at least 1024;"),
        ({"held_out": str(short)}, r"--held-out .*short: \d tokens, expected at least 256; give"),
        ({"held_out": str(broken)}, "--held-out .*broken: cannot be read as UTF-8 text"),
        ({"held_out": str(tmp_path / "none")}, "--held-out .*none: cannot be read as UTF-8 text"),
    ]:
        with pytest.raises(UserError, match=message):
            export(ExportOptions(model=str(root / "model"), out=str(tmp_path / "x"), **options))
    assert not (tmp_path / "x").exists()
