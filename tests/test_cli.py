"""The command line as a contract: verbs, help, precedence, one-line errors, exit codes."""

import json
import resource
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from gptopt import cli
from gptopt import config as config_module
from gptopt.errors import UserError
from gptopt.verbs import VERBS


def parse(verb, *arguments):
    return cli.parse(verb, list(arguments))


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_instant_and_imports_no_torch(verb):
    arguments = [verb, "--help"] if verb else ["--help"]
    code = (
        "import sys\nfrom gptopt.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'pyarrow'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: gptopt" in done.stdout
    # Processor time, not the clock's: what else the machine does must not fail this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_function_is_not_hidden_by_a_module_of_its_name(verb):
    """Importing pkg.name sets pkg's attribute `name`: the second call would find a module."""
    module, _, name = VERBS[verb].function.partition(":")
    folder = Path(*module.split(".")[1:])
    beside = Path(cli.__file__).parent / folder / f"{name}.py"
    assert not beside.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_is_documented(verb):
    for key, field in cli._leaves(VERBS[verb].options_class):
        assert field.description, f"{verb}: {key}"


def test_flags_of_the_contract_are_accepted():
    parse("demo", "--out", "d", "--seconds", "3")
    parse("tokenize", "a", "b", "--out", "d", "--kind", "char", "--vocab-size", "99",
          "--tokenizer", "t", "--val-fraction", "0.2")  # fmt: skip
    parse("train", "a", "--out", "r", "--preset", "gpt2", "--resume", "--init-from", "m",
          "--kernels", "reference", "--model.n-layer", "2", "--steps", "5", "--batch-size", "2",
          "--lr", "1e-2", "--eval-every", "2", "--checkpoint-every", "2",
          "--seed", "3")  # fmt: skip
    parse("generate", "m", "--prompt", "x", "--max-new-tokens", "3", "--temperature", "0",
          "--top-k", "3", "--top-p", "0.5", "--seed", "1", "--json")  # fmt: skip
    parse("evaluate", "m", "--data", "d", "--json")
    parse("export", "m", "--out", "e", "--force")
    parse("validate", "e", "--model", "m", "--json")
    parse("run", "e", "--prompt", "x", "--max-new-tokens", "3", "--temperature", "0", "--json",
          "--provider", "cpu", "--threads", "2")  # fmt: skip
    parse("doctor", "--json")


def test_precedence_is_default_preset_file_flag(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('preset = "gpt-tiny"\nlr = 5e-3\nsteps = 7\n[model]\nn-head = 2\n')
    options = parse("train", "in", "--out", "r", "--config", str(file), "--steps", "9")
    assert options.steps == 9  # flag over file
    assert options.lr == 5e-3  # file over default
    assert options.model.n_head == 2  # file over preset
    assert options.model.n_layer == 4  # preset over default
    assert options.batch_size == 16  # default


def test_booleans_turn_off_and_none_clears(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[model]\nwindow = 8\nbias = true\n")
    options = parse(
        "train", "in", "--out", "r", "--config", str(file), "--model.no-bias",
        "--model.window", "none",
    )  # fmt: skip
    assert options.model.bias is False
    assert options.model.window is None


def test_repeated_flags_make_a_list():
    assert parse("run", "e", "--prompt", "a", "--prompt", "b").prompt == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "a", "--out", "r", "--model.n-layr", "3"], "did you mean '--model.n-layer'"),
        (["train", "a", "--out", "r", "--model.n-embd", "100", "--model.n-head", "3"],
         "n_embd=100 is not divisible by n_head=3"),
        (["train", "a", "--out", "r", "--model.n-layer", "-1"], "--model.n-layer: found '-1'"),
        (["train", "a", "--out", "r", "--model.n-embd", "99999999999"], "--model.n-embd: found"),
        (["train", "a", "--out", "r", "--lr", "fast"], "--lr: found 'fast'"),
        (["train", "a", "--out", "r", "--lr", "nan"], "--lr: found"),
        (["train", "a", "--out", "r", "--lr", "1e-4", "--min-lr", "1"], "min_lr=1.0 is above"),
        (["train", "a"], "--out is required"),
        (["train", "--out", "r"], "INPUT"),
        (["train", "a", "--out", "r", "--preset", "gtp2"], "did you mean 'gpt2'"),
        (["train", "a", "--out", "r", "--config", "absent.toml"], "absent.toml: cannot be read"),
        (["run", "e", "--prompt"], "--prompt"),
        (["trian"], "did you mean 'train'"),
        (["run", "absent", "--prompt", "x"], "absent"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_exit_code_2(capsys, arguments, expected):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("gptopt: error:")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nn_layr = 3\n", "unknown key 'model.n_layr' (did you mean 'model.n_layer'?)"),
        ("learning_rate = 3\n", "unknown key 'learning_rate'"),
        ("lr = -1\n", "lr: found -1"),
        ("lr = \n", "not valid TOML"),
        ("model = 3\n", "model"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(tmp_path, text, expected):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("train", "a", "--out", "r", "--config", str(file))
    assert expected in str(error.value)
    assert "c.toml" in str(error.value)


def test_every_preset_is_a_valid_model():
    for name in config_module.PRESETS:
        model = parse("train", "a", "--out", "r", "--preset", name).model
        assert model.n_embd % model.n_head == 0


def test_json_is_alone_on_stdout(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    out, _ = capsys.readouterr()
    report = json.loads(out)
    assert report["packages"]["numpy"]
    assert set(report["operators"]) >= {"attention", "layernorm", "ffn", "cross_entropy", "rotary"}


def test_doctor_says_one_line_each(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("attention ") and "reference" in line for line in lines)


def test_every_default_is_valid():
    for verb in VERBS.values():
        options = verb.options_class
        for key, field in cli._leaves(options):
            if not field.is_required() and typing.get_origin(field.annotation) is typing.Literal:
                assert field.default in typing.get_args(field.annotation), key


def test_a_saved_config_can_be_used_again(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('inputs = ["corpus.txt"]\nout = "runs/a"\nsteps = 3\n')
    options = parse("train", "--config", str(file), "--out", "runs/b")
    assert (options.inputs, options.out, options.steps) == (["corpus.txt"], "runs/b", 3)
