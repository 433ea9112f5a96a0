"""The profile of a token or a prompt: operators, how many nodes, shares of their sum."""

import pytest

from gptopt.bench import inference_profile
from gptopt.bench.edge_memory import profile_memory
from gptopt.bench.edge_profile import _by_operator
from gptopt.cli import in_one_line
from gptopt.errors import CheckFailed


def node(name, op, at, us, width=None, rows=1):
    shape = [{"float": [1, rows, width or 8]}]
    args = {"op_name": op, "output_type_shape": shape}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": us, "args": args}


def run_at(at):
    return {"cat": "Session", "name": "model_run", "ts": at, "dur": 900}


def rows_of(found, unit):
    return [tuple(row[key] for key in ("op", "width", "nodes", "us", unit)) for row in found]


def test_nodes_are_added_up_by_operator_and_width():
    events = []
    for run, slow in enumerate((50, 1, 3)):  # the first run warms up
        at = 1000 * run
        events.append(run_at(at))
        events += [
            node("a", "MatMul", at + 1, 10 * slow, 3072), node("b", "MatMul", at + 2, 20, 768),
            node("c", "MatMul", at + 3, 5, 768), node("d", "Add", at + 4, 2),
            node("e", "Attention", at + 5, 4),
        ]  # fmt: skip
        events.append({"cat": "Node", "name": "d_fence_before", "ts": at + 4, "dur": 99})
    bytes_of = {"a": 70, "b": 5, "c": 6, "e": 9}
    found = _by_operator(events, 2, 1, lambda op, name, rows: bytes_of.get(name, 0), "bytes")
    assert rows_of(found, "bytes") == [
        ("MatMul", 768, 2, 25.0, 11), ("MatMul", 3072, 1, 20.0, 70), ("Attention", 0, 1, 4.0, 9),
        ("Add", 0, 1, 2.0, 0),
    ]  # fmt: skip
    assert [row["share"] for row in found] == [25 / 51, 20 / 51, 4 / 51, 2 / 51]


def test_parts_of_a_prompt_are_one_reading():
    events = []
    for run, (us, rows) in enumerate(((99, 9), (99, 9), (10, 4), (1, 2), (30, 4), (5, 2))):
        events += [run_at(1000 * run), node("a", "MatMul", 1000 * run + 1, us, 8, rows)]
    found = _by_operator(events, 4, 2, lambda op, name, rows: 3 * rows, "ops")
    assert rows_of(found, "ops") == [("MatMul", 8, 1, (11 + 35) / 2, 3 * 6)]


def test_a_process_that_ends_early_is_one_line_of_its_own_words(tmp_path):
    with pytest.raises(CheckFailed, match=r"with 2: gptopt: error: .*no such folder") as caught:
        profile_memory(tmp_path / "missing", "q4")
    assert "\n" not in str(caught.value)


def test_results_that_are_not_there_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["inference_profile", str(tmp_path)])
    assert in_one_line(inference_profile.main) == 2
    assert capsys.readouterr().err.count("\n") == 1
