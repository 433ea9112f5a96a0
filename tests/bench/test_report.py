"""The page and the targets, from rows alone."""

import json
from html.parser import HTMLParser

import pytest

torch = pytest.importorskip("torch")  # before what imports it: hence E402 below
pytest.importorskip("matplotlib")

from gptopt.bench.cases import cases  # noqa: E402
from gptopt.bench.contenders import BOUND, CUDNN, EAGER, FLASH, OURS  # noqa: E402
from gptopt.bench.limits import Limits  # noqa: E402
from gptopt.bench.operators import least_work  # noqa: E402
from gptopt.bench.report import write_report  # noqa: E402
from gptopt.bench.targets import NOT_MEASURED, targets  # noqa: E402
from gptopt.bench.training import NANOGPT, OURS_COMPILED  # noqa: E402
from gptopt.errors import UserError  # noqa: E402

LIMITS = Limits(4e12, {"float32": 5e13, "bfloat16": 7e14})


def machine(name="NVIDIA H200"):
    return {
        "machine": {"processor": "a CPU", "versions": {"torch": "2.11"}, "commit": "abc"},
        "gpu": {"name": name} if name else None,
        "limits": LIMITS.as_json(),
        "command": "gptopt bench kernels <with care>",
        "date": "2026-01-01T00:00+00:00",
    }


def row(case, phase, contender, share, **more):
    work = least_work(case, phase)
    ms = LIMITS.ms(work, "bfloat16") / share
    spread = {"median_ms": ms, "q1_ms": 0.9 * ms, "q3_ms": 1.1 * ms, "samples": 9}
    return {
        "bench": "kernels", "operator": case.operator, "case": case.name, "device": "cuda",
        "sizes": dict(case.sizes), "options": dict(case.options), "dtype": "bfloat16",
        "target": case.target, "phase": phase, "contender": contender, "bound": contender == BOUND,
        "cold": spread, "warm": spread, "wall_ms": ms, "host_ms": 0.1, "peak_bytes": 2**20,
        "flops": work.flops, "bytes": work.bytes, "tflops": work.flops / ms / 1e9,
        "gb_per_s": work.bytes / ms / 1e6, "share_of_limit": share,
        "correct": None if contender == BOUND else True, **more,
    }  # fmt: skip


SHARES = {OURS: 0.9, FLASH: 0.6, CUDNN: 0.8, EAGER: 0.3, BOUND: 0.92}


def rows_of(*operators, **more):
    return [
        row(case, phase, name, share, **more)
        for case in cases(torch.device("cuda"), quick=True, only=list(operators))
        for phase in case.phases
        for name, share in SHARES.items()
    ]


def reached(rows, what):
    (found,) = [line for line in targets(rows, machine()) if line.what.startswith(what)]
    return found


def test_nothing_is_reached_without_a_gpu():
    for rows in ([], rows_of("attention", "layernorm", device="cpu")):
        for line in targets(rows, machine(None)):
            assert line.reached == NOT_MEASURED
            assert line.met is None


def test_targets_are_computed_from_the_rows():
    rows = rows_of("attention", "layernorm", "cross_entropy", "ffn")
    flash = reached(rows, "attention d64 causal forward, T 1024, over SDPA flash")
    assert (flash.reached, flash.met) == ("1.5x", True)
    speed = reached(rows, "attention d128 causal forward")
    assert (speed.reached, speed.met) == ("630 TFLOP/s", True)
    assert speed.limit == "700, a product"
    norm = reached(rows, "layernorm with residual, backward")
    assert (norm.reached, norm.met) == ("90 %", True)
    head = reached(rows, "cross_entropy over its three products")
    assert (head.reached, head.met) == ("1.02x", True)
    memory = reached(rows, "cross_entropy memory")
    assert (memory.reached, memory.met) == ("1x", False)


def test_a_wrong_result_reaches_nothing():
    rows = rows_of("attention")
    for one in rows:
        if one["contender"] == OURS:
            one["correct"] = False
    for line in targets(rows, machine()):
        if line.what.startswith("attention") and "deterministic" not in line.what:
            assert "wrong result" in line.reached
            assert line.met is False


def test_the_worst_case_decides():
    rows = rows_of("layernorm")
    slow = next(r for r in rows if "16384 x 4096" in r["case"] and r["contender"] == OURS)
    slow["share_of_limit"] = 0.5
    assert reached(rows, "layernorm with residual, forward").reached == "50 %"


def test_a_step_is_held_against_nanogpt():
    head = {"bench": "training", "device": "cuda", "case": "c", "correct": True, "mfu": 0.5}
    rows = [
        {**head, "contender": OURS, "tokens_per_s": 650_000.0, "peak_bytes": 50},
        {**head, "contender": NANOGPT, "tokens_per_s": 500_000.0, "peak_bytes": 100},
    ]
    whole = reached(rows, "GPT-2 124M training")
    assert (whole.reached, whole.met, whole.limit) == (
        "650,000 tokens/s", True, "1,300,000 tokens/s",
    )  # fmt: skip
    assert reached(rows, "training speed").reached == "1.3x"
    assert reached(rows, "training memory").reached == "0.5x"
    rows.append({**rows[0], "contender": OURS_COMPILED, "tokens_per_s": 1e6, "peak_bytes": 80})
    assert reached(rows, "training speed").reached == "2x"
    assert reached(rows, "training memory").met is False


class _Page(HTMLParser):
    """Counts tags and keeps the links."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write(folder, name, rows, head=None):
    lines = [head or machine(), *rows]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read(folder):
    page = _Page()
    page.feed((folder / "report.html").read_text())
    page.close()
    assert page.open == []
    return page


def test_the_page_holds_everything_in_one_file(tmp_path):
    rows = rows_of("attention", "layernorm")
    for one in rows:
        if one["contender"] == FLASH:
            one["correct"] = False
    write(tmp_path, "kernels", [*rows, {"contender": "Liger", "operator": "layernorm",
          "case": "c", "phase": None, "error": "not <here>"}])  # fmt: skip
    write_report(tmp_path)
    page = read(tmp_path)
    assert len(page.links) >= 4  # distances, roofline, and a chart per operator
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "NVIDIA H200" in page.text
    assert "<with care>" in page.text
    assert "not <here>" in page.text
    assert "Wrong, so without a figure: SDPA flash." in page.text
    assert "tiny shapes" not in page.text
    summary = (tmp_path / "report.md").read_text()
    assert "| attention | d64 causal T 1024 | forward | SDPA flash |" in summary
    assert "- | NO |" in summary
    assert json.loads((tmp_path / "targets.json").read_text())


def test_a_cpu_s_page_says_that_it_measures_the_machinery(tmp_path):
    write(tmp_path, "kernels", rows_of("rotary", device="cpu"), machine(None))
    write_report(tmp_path)
    assert "says nothing about the kernels" in read(tmp_path).text
    assert "says nothing about the kernels" in (tmp_path / "report.md").read_text()


def test_figures_of_two_machines_do_not_mix(tmp_path):
    head = {"device": "cuda", "dtype": "bfloat16", "correct": True, "bound": False}
    write(tmp_path, "kernels", rows_of("layernorm"))
    step = {**head, "bench": "training", "case": "c", "contender": OURS, "tokens_per_s": 9e9}
    write(tmp_path, "training", [step], machine("another GPU"))
    found = {line["what"]: line for line in write_report(tmp_path)}
    assert found["GPT-2 124M training"]["reached"] == NOT_MEASURED


def test_a_file_that_is_no_result_is_one_line(tmp_path):
    (tmp_path / "kernels.jsonl").write_text('{"contender": "gptopt"}\n')
    with pytest.raises(UserError, match=r"kernels\.jsonl: line 1 is not a bench's"):
        write_report(tmp_path)


def test_an_empty_folder_has_no_report(tmp_path):
    assert write_report(tmp_path) == []
    assert not list(tmp_path.iterdir())
