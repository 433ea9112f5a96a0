"""`gptopt plot`: what runs logged, in one picture."""

import json

import pytest

from gptopt.config import PlotOptions
from gptopt.errors import UserError
from gptopt.training import plot as module
from gptopt.training.plot import plot


def make_run(folder, losses, **extra):
    folder.mkdir(parents=True)
    lines = [
        {"step": at, "loss": loss, "lr": 1e-3, "tokens": 64 * at, "seconds": 0.5 * at} | extra
        for at, loss in enumerate(losses, 1)
    ]
    lines[-1]["val_loss"] = losses[-1] + 0.5
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # cut off by a kill
    return str(folder)


@pytest.fixture
def options(tmp_path):
    def make(*runs, out="picture.svg", **changes):
        return PlotOptions(runs=list(runs), out=str(tmp_path / out), json=True, **changes)

    return make


def test_an_svg_names_every_run_and_what_was_logged(options, tmp_path):
    one = make_run(tmp_path / "one", [4.0, 3.0, 2.5], grad_norm=1.0, memory_bytes=2**31)
    two = make_run(tmp_path / "two", [4.2, 3.9])
    result = plot(options(one, two, x="tokens"))
    assert result["runs"] == [
        {"name": "one", "steps": 3, "loss": 2.5, "best_val_loss": 3.0},
        {"name": "two", "steps": 2, "loss": 3.9, "best_val_loss": 4.4},
    ]
    drawn = (tmp_path / "picture.svg").read_text()
    for text in ("one training", "two validation", "gradient norm", "memory", "tokens"):
        assert f"<!-- {text}" in drawn
    assert "<!-- tokens/s" not in drawn  # nobody logged it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "picture.svg", "two"]


@pytest.mark.parametrize("axis", ["step", "tokens", "seconds"])
def test_points_stand_where_they_were_logged(options, tmp_path, monkeypatch, axis):
    run = make_run(tmp_path / "one", [4.0, 3.0])
    drawn = {}

    real = module._draw

    class Spy:
        def __init__(self, axes):
            self.axes = axes

        def plot(self, places, values, **style):
            drawn[style["label"]] = (places, values)
            self.axes.plot(places, values, **style)

    monkeypatch.setattr(
        module, "_draw", lambda axes, *rest, **style: real(Spy(axes), *rest, **style)
    )
    plot(options(run, x=axis, out="a.png"))
    unit = {"step": 1, "tokens": 64, "seconds": 0.5}[axis]
    assert drawn["one validation"] == ((2 * unit,), (3.5,))
    assert drawn["one training"][0] == (1 * unit, 2 * unit)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_by_their_paths(options, tmp_path):
    runs = [make_run(tmp_path / name / "run", [2.0]) for name in ("a", "b")]
    assert [run["name"] for run in plot(options(*runs))["runs"]] == runs


@pytest.mark.parametrize(
    ("runs", "changes", "named"),
    [
        (["good"], {"out": "picture.gif"}, "found .gif, expected .png, .svg, .pdf"),
        (["good"], {"out": "no/where.png"}, "there is no folder"),
        (["good", "bare"], {}, "has no metrics.jsonl"),
        (["empty"], {}, "has logged nothing yet"),
        (["good", "good"], {}, "given twice"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(options, tmp_path, runs, changes, named):
    make_run(tmp_path / "good", [2.0])
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=named) as error:
        plot(options(*(str(tmp_path / run) for run in runs), **changes))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "empty", "good"]
