"""`gptopt run` as a user sees it: stdout, stderr, JSON, exit codes, Ctrl-C, what it imports."""

import json
import signal
import subprocess
import sys
import time

import pytest

from gptopt.config import RunOptions
from gptopt.errors import UserError
from gptopt.runtime.verbs import run

KEYS = {"prompt", "text", "tokens", "finish_reason", "prompt_tokens", "new_tokens"}


def options(folder, prompt=("fox",), **more):
    values = {"temperature": 0, "max_new_tokens": 6, "threads": 1, **more}
    return RunOptions(folder=str(folder), prompt=list(prompt), **values)


def test_one_prompt_streams_to_stdout(pristine, capsys):
    result = run(options(pristine))
    out = capsys.readouterr().out
    assert out == "fox" + result["text"] + "\n"
    assert result["provider"] == "cpu"
    assert result["new_tokens"] == len(result["tokens"]) == 6
    assert result["finish_reason"] == "length"
    assert result["time_to_first_token_ms"] > 0
    assert result["tokens_per_second"] > 0
    assert {key: result[key] for key in KEYS} == result["results"][0]


def test_several_prompts_are_shown_one_after_the_other(pristine, tokenizer, capsys):
    result = run(options(pristine, ["fox", "the lazy dog", ""], stop=["zzz"]))
    shown = capsys.readouterr().out
    assert shown == "\n---\n".join(r["prompt"] + r["text"] for r in result["results"]) + "\n"
    assert [r["prompt"] for r in result["results"]] == ["fox", "the lazy dog", ""]
    assert [r["tokens"] for r in result["results"]] == [
        run(options(pristine, [prompt], json=True))["tokens"]
        for prompt in ("fox", "the lazy dog", "")
    ]
    assert "text" not in result
    assert result["new_tokens"] == 18
    assert result["results"][2]["prompt_tokens"] == 1  # the start token


def test_a_prompt_without_an_answer_is_still_shown(pristine, capsys):
    first = run(options(pristine, json=True, max_new_tokens=1))["text"]
    result = run(options(pristine, stop=[first]))
    assert (result["text"], result["finish_reason"]) == ("", "stop")
    assert capsys.readouterr().out == "fox\n"


def test_json_writes_nothing_itself(pristine, capsys):
    run(options(pristine, json=True))
    assert capsys.readouterr().out == ""


def test_a_full_context_is_told(pristine, capsys, caplog):
    result = run(options(pristine, max_new_tokens=100))
    assert result["finish_reason"] in ("context", "eos")
    assert ("--context slide" in caplog.text) == (result["finish_reason"] == "context")
    slid = run(options(pristine, max_new_tokens=100, context="slide"))
    assert slid["tokens"][: len(result["tokens"])] == result["tokens"]


def test_speed_is_told_on_a_terminal(pristine, capsys, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    caplog.set_level("INFO", "gptopt")
    run(options(pristine))
    assert "cpu fp32: first token after " in caplog.text
    assert "tokens/s" in caplog.text


def test_without_a_prompt_there_is_nothing_to_do(pristine):
    with pytest.raises(UserError, match="--prompt"):
        run(options(pristine, []))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_the_command_prints_one_json_object(gptopt, pristine, sampling):
    flags = [item for key, value in sampling.items() for item in (f"--{key}", value)]
    done = gptopt(
        "run", pristine, "--prompt", "the fox", "--max-new-tokens", 5, "--json", *flags,
        "--threads", 1,
    )  # fmt: skip
    found = json.loads(done.stdout)
    expected = run(options(pristine, ["the fox"], max_new_tokens=5, json=True, **sampling))
    for key in (*KEYS, "seed", "provider"):
        assert found[key] == expected[key]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prompt", "word " * 40], 2, "tokens, the model sees 16"),
        (["--prompt", "x", "--provider", "cuda"], 2, "available here: cpu"),
        (["--prompt", "x", "--temperature", "-1"], 2, "--temperature"),
    ],
)
def test_mistakes_end_in_one_line(gptopt, pristine, flags, code, message):
    done = gptopt("run", pristine, *flags, check=False)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_changed_folder_fails_the_check(gptopt, folder):
    with (folder / "onnx" / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"!")
    done = gptopt("run", folder, "--prompt", "x", check=False)
    assert done.returncode == 1
    assert "sha256 differs" in done.stderr
    assert done.stderr.count("\n") <= 2


def test_run_loads_no_torch_and_no_onnx(pristine):
    code = (
        "import sys, gptopt.runtime\n"
        "assert not {'onnxruntime', 'numpy'} & set(sys.modules), 'nothing yet'\n"
        "from gptopt.cli import main\n"
        f"assert main(['run', {str(pristine)!r}, '--prompt', 'x', '--max-new-tokens', '2']) == 0\n"
        "assert 'onnxruntime' in sys.modules\n"
        "heavy = {'torch', 'triton', 'onnx', 'onnxscript', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=60)


def test_without_onnxruntime_the_way_out_is_told(pristine, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'gptopt\[edge\]'"):
        run(options(pristine))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_with_130_and_no_traceback(build_folder):
    endless = build_folder(block_size=64)
    command = [sys.executable, "-P", "-m", "gptopt", "run", endless, "--prompt", "fox"]
    process = subprocess.Popen(
        [*command, "--temperature", "0", "--context", "slide", "--max-new-tokens", "10000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(20)  # it is on its way
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"interrupted" in errors
