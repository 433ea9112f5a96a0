"""`gptopt bench inference`: turns, what is compared, medians and ratios. No runtime takes part."""

import json
import sys
from pathlib import Path

import pytest

from gptopt.bench import inference as bench
from gptopt.bench import inference_profile
from gptopt.bench.inference_goals import reached, table
from gptopt.bench.inference_models import PRESETS, _searched, make_edges, make_gpt2, write_tokenizer
from gptopt.bench.inference_report import limits, summarise, write_chart, write_table
from gptopt.bench.processes import Worker, run_once, worker_command
from gptopt.config_machine import InferenceOptions
from gptopt.errors import UserError
from gptopt.precisions import PRECISIONS
from gptopt.runtime.variants import edge_files

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="stops Linux processes")

FAKE = """
import json, sys, time
name = sys.argv[1]
if name == "broken":
    print(json.dumps({"error": "ImportError: no such package"})); sys.exit()
print(json.dumps({"version": name, "disk_bytes": 1000, "cache_bytes": 4, "import_s": 1.0,
                  "load_s": 0.25, "peak_mib": 10.0}), flush=True)
for line in sys.stdin:
    c = json.loads(line)
    if "memory" in c:
        print(json.dumps({"peak_mib": 10.0}), flush=True); continue
    if name == "mortal":
        sys.exit()
    token = 7 if name != "liar" else c["seed"]
    made = [[token] * c["new"]] * c["rows"]
    speed = 200.0 if name == "fast" else 100.0
    print(json.dumps({"first_ms": 1e3 / speed, "tokens_per_s": speed, "made": made}
                     if c["new"] > 1 else {"first_ms": 1e3 / speed, "made": made}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Contenders by name, each a process of FAKE."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(
        bench, "worker_command", lambda python, peer, model, variant: [
            sys.executable, "-P", str(script), variant]
    )  # fmt: skip
    monkeypatch.setattr(bench, "wait_for_quiet", lambda *limits: None)
    return lambda *names: [
        bench.Contender(name, peer, "", tmp_path, variant) for name, peer, variant in names
    ]


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_stands_still_between_its_turns(tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(
        "import json, sys, threading\n"
        "def spin():\n"
        "    while True: pass\n"
        "threading.Thread(target=spin, daemon=True).start()\n"
        "print(json.dumps({'ready': 1}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'heard': json.loads(line)}), flush=True)\n"
    )
    with Worker([sys.executable, "-P", str(script)], {}) as worker:
        assert worker.hello == {"ready": 1}
        pid = worker._process.pid
        for turn in range(3):
            assert worker.ask(turn=turn)["heard"] == {"turn": turn}
            used = worker._own_s()
            sum(range(3_000_000))
            assert state(pid) in "Tt"
            assert worker._own_s() == used
    assert worker._process.poll() is not None
    assert worker.ask(turn=9) == {"error": "the process is gone"}


def test_a_worker_that_dies_between_two_questions_is_an_error(tmp_path):
    script = (
        "import time; print('{}', flush=True); input(); print('{}', flush=True); time.sleep(60)"
    )
    with Worker([sys.executable, "-c", script], {}) as worker:
        assert "error" not in worker.ask(turn=0)
        worker._process.kill()
        worker._process.poll = lambda: None  # it dies after it was last seen alive
        worker._process.send_signal = lambda _: None
        worker._process.wait()
        assert worker.ask(turn=1)["error"]


def test_a_worker_that_dies_is_an_error_and_no_hang():
    with Worker([sys.executable, "-c", ""], {}) as worker:
        assert "ended without an answer" in worker.hello["error"]


def test_what_a_preparation_says_when_it_fails():
    assert run_once([sys.executable, "-c", ""]) is None
    said = 'print(\'{"error": "no torch"}\')'
    assert run_once([sys.executable, "-c", said]) == "no torch"
    assert "boom" in run_once([sys.executable, "-c", "raise SystemExit('boom')"])


def test_the_real_worker_names_a_package_that_is_missing(tmp_path):
    command = worker_command("", "llamacpp", tmp_path, "q4_0")
    with Worker([*command, "--threads", "1"], {}) as worker:
        assert worker.hello["error"].startswith("ModuleNotFoundError")


def test_the_real_worker_measures_memory_bandwidth(tmp_path):
    command = worker_command("", "bandwidth", tmp_path, "read")
    with Worker([*command, "--threads", "1"], {"OPENBLAS_NUM_THREADS": "1"}) as worker:
        answer = worker.ask(rows=1, tokens=4, new=2, seed=0, vocab=9)
    assert 0.1 < answer["tokens_per_s"] < 2000  # GB/s
    assert answer["peak_mib"] > 512


def test_what_contenders_say_is_compared_with_pytorch(fake):
    found = bench.compare(
        fake(("b", "x", "liar"), ("c", "x", "slow"), ("d", "x", "broken"), ("e", "x", "mortal"),
             ("torch float32", "torch_eager", "slow")),
        1, 50,
    )  # fmt: skip
    rows = {row["contender"]: row for row in found}
    assert rows["c"]["same"] == rows["c"]["tokens"] == 12
    assert rows["c"]["greedy_prefix"] == 32
    assert rows["b"]["same"] == 0
    assert rows["b"]["greedy_prefix"] == 32  # its seed is 7, as the token of the others
    assert rows["d"]["error"] == "ImportError: no such package"
    assert "ended without an answer" in rows["e"]["error"]


def test_a_race_gives_medians_ratios_and_files(fake, tmp_path, monkeypatch):
    source = tmp_path / "model"
    source.mkdir()
    shape = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 50}
    (source / "config.json").write_text(json.dumps(shape))
    racing = fake(("torch float32", "torch_eager", "slow"), ("other", "x", "fast"))
    monkeypatch.setattr(bench, "_contenders", lambda options, source: iter(racing))
    options = InferenceOptions(
        work=str(tmp_path), model=str(source), out=str(tmp_path / "out"), rounds=3,
        anchor="torch float32", json=True,
    )  # fmt: skip
    found = bench.inference(options)
    lines = {(line["workload"], line["contender"]): line for line in found["summary"]}
    decode = lines["decode 32+128", "other"]
    assert (decode["value"], decode["unit"], decode["samples"]) == (200.0, "tokens/s", 3)
    assert decode["ratio"] == 2.0
    assert lines["prefill 512", "other"]["ratio"] == 2.0  # milliseconds: half is twice as fast
    assert lines[bench.LOAD, "other"]["value"] == 255.0
    # 1000 bytes of weights, and 2 x 2 layers x 8 channels x 96 tokens x 4 bytes of cache.
    probe = lines["decode 32+128", bench.PROBE]["value"]
    assert decode["floor_share"] == pytest.approx(200 * (1000 + 2 * 2 * 8 * 96 * 4) / probe / 1e9)
    rows = [json.loads(line) for line in Path(found["files"][0]).read_text().splitlines()]
    assert rows[0]["anchor"] == "torch float32"
    turns = [r["contender"] for r in rows if r.get("workload") == "prefill 512"]
    assert turns[:6] == ["torch float32", "other", bench.PROBE, bench.PROBE, "other",
                         "torch float32"]  # fmt: skip
    table = Path(found["files"][1]).read_text()
    assert "| other | 5.0 (5.0-5.0) 2.00x | 200 (200-200) 2.00x |" in table
    assert Path(found["files"][2]).read_text().lstrip().startswith("<?xml")


def test_disturbed_samples_are_counted_and_failures_left_out(tmp_path):
    head = {"anchor": "a", "threads": 2, "machine": {"processor": "p", "commit": "c"},
            "shape": {"n_layer": 1, "n_embd": 1}}  # fmt: skip
    sample = {"kind": "sample", "workload": "prefill 512", "contender": "a"}
    rows = [head, {**sample, "first_ms": 3.0, "other_cpu": 0.5},
            {**sample, "first_ms": 1.0, "other_cpu": 0.0}, {**sample, "error": "x"}]  # fmt: skip
    (line,) = summarise(rows)
    assert (line["value"], line["low"], line["high"], line["disturbed"]) == (2.0, 1.0, 3.0, 1)
    assert line["samples"] == 2
    write_table(tmp_path, rows, [line])
    write_chart(tmp_path, rows, [line])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peer_python": ["nothing"]}, "expected NAME=PYTHON with one of torch"),
        ({"peer_python": ["genai=/no/such/python"]}, "no such program"),
        ({"contenders": ["vllm"]}, "--contenders vllm: unknown, choose from gptopt, torch"),
        ({"workloads": ["speed"]}, "--workloads 'speed': unknown, choose from 'prefill 512'"),
        ({"contenders": ["openvino"]}, "no contender is left"),
    ],
)
def test_mistakes_are_one_line(tmp_path, values, message):
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    options = InferenceOptions(model=str(tmp_path), work=str(tmp_path), **values)
    with pytest.raises(UserError, match=message) as caught:
        bench.inference(options)
    assert "\n" not in str(caught.value)


def test_a_contender_may_be_one_variant(tmp_path):
    options = InferenceOptions(work=str(tmp_path), contenders=["torch float32", "transformers"])
    found = [each.name for each in bench._contenders(options, tmp_path)]
    assert found == ["torch float32", "transformers generate-float32"]


def test_the_model_has_a_tokenizer_of_its_size(tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, 1000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.decode(tokenizer.encode("na\u00efve fox!").ids) == "na\u00efve fox!"


@pytest.mark.slow
def test_the_model_says_different_tokens_behind_different_texts(tmp_path):
    import torch
    from transformers import GPT2LMHeadModel

    make_gpt2(tmp_path / "m", n_layer=2, n_head=2, n_embd=64, vocab_size=1000, n_positions=64)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    texts = torch.randint(0, 999, (16, 9), generator=torch.Generator().manual_seed(0))
    said = model(texts).logits[:, -1].argmax(-1)
    assert len(set(said.tolist())) > 8
    assert (said != texts[:, -1]).sum() > 12


def test_measured_files_have_the_formats_of_their_preset():
    from dataclasses import replace

    preset = PRECISIONS["q4"]
    found = _searched(preset)
    formats = [found.layers, found.head, *found.overrides.values()]
    assert [form.method for form in formats] == ["search"] * 3
    assert replace(found.layers, method="gptq") == preset.layers
    assert replace(found.head, method="gptq") == preset.head
    assert found.overrides.keys() == preset.overrides.keys()
    assert _searched(PRECISIONS["q8"]).layers == PRECISIONS["q8"].layers


@pytest.mark.slow
def test_the_folders_of_the_goals_are_made_once_and_profiled(tmp_path, monkeypatch):
    make_gpt2(tmp_path / "m", n_layer=2, n_head=2, n_embd=64, vocab_size=1000, n_positions=1024)
    folders = make_edges(tmp_path / "m", tmp_path)
    assert [folder.name for folder in folders] == list(PRESETS)
    for folder in folders:
        _, precisions, int8_cache = PRESETS[folder.name]
        files = edge_files(folder)
        assert list(files) == precisions.split(",")
        assert {file.cache_dtype == "int8" for file in files.values()} == {int8_cache}
    before = [path.stat().st_mtime_ns for path in folders]
    assert make_edges(tmp_path / "m", tmp_path) == folders
    assert [path.stat().st_mtime_ns for path in folders] == before
    prompt = inference_profile._profiled(folders[1], "q8", "prefill 512", 1)
    products = [row for row in prompt["operators"] if row["op"] == "DynamicQuantizeMatMul"]
    # Behind the last attention only the last position goes on: 9 of the 12 matrices' worth.
    assert sum(row["ops"] for row in products) == 2 * 64 * 64 * ((12 + 3) * 512 + 9)
    attention = next(row for row in prompt["operators"] if "Attention" in row["op"])
    assert attention["ops"] == pytest.approx(2 * 2 * 64 * 512 * 513, rel=1e-3)
    memory = inference_profile._profiled(folders[0], "q4", "peak_mib", 1)
    peaks = [stage["peak_mib"] for stage in memory["stages"]]
    assert len(peaks) == 5
    assert peaks == sorted(peaks)


def goals_of(rates):
    """The goals of a run in which contenders decoded so many tokens per second."""
    rows = [{"anchor": "gptopt a q4"}]
    for name in rates:
        rows.append({"kind": "load", "contender": name, "disk_bytes": 85e6})
        rows.append({"kind": "memory", "contender": name, "peak_mib": 200.0})
    summary = [
        {"workload": workload, "contender": name, "unit": "tokens/s", "value": rate}
        for name, rate in rates.items()
        for workload in ("decode 32+128", "decode 896+128")
    ]
    return {(g["goal"], g["workload"], g["over"]): g for g in reached(rows, summary)}


def test_goals_name_the_preset_that_meets_them_and_what_is_missing():
    found = goals_of({"gptopt a q4": 120.0, "gptopt b q4": 130.0, "llamacpp q4_0": 100.0})
    short = found["q4", "decode 32+128", "llamacpp q4_0"]
    assert (short["by"], short["value"], short["reached"]) == ("gptopt b q4", 1.3, True)
    long = found["q4", "decode 896+128", "llamacpp q4_0"]
    assert not long["reached"]
    assert long["short_of"] == pytest.approx(1 - 1.3 / 1.4)
    size = found["size of q4", "disk_mb", None]
    assert (size["value"], size["reached"]) == (85.0, False)
    assert found["memory of q4", "peak_mib", None]["reached"]
    assert not [key for key in found if key[0].startswith(("q8", "fp32", "load"))]
    assert "6% short" in table(list(found.values()))[-2]
    nearly = short | {"reached": False, "short_of": 0.001}
    assert "| 0.1% short |" in table([nearly])[-1]


def test_what_limits_a_missed_goal_is_profiled_and_told(tmp_path, monkeypatch):
    head = {"anchor": "gptopt a q4", "threads": 2, "machine": {"processor": "p", "commit": "c"},
            "shape": {"n_layer": 1, "n_embd": 1}}  # fmt: skip
    rows = [head]
    for name, rate in (("gptopt a q4", 120.0), ("llamacpp q4_0", 100.0)):
        rows.append({"kind": "load", "contender": name, "disk_bytes": 1, "cache_bytes": 4})
        for workload in ("decode 32+128", "decode 896+128"):
            rows.append({"kind": "sample", "workload": workload, "contender": name,
                         "tokens_per_s": rate, "other_cpu": 0.0})  # fmt: skip
    operators = [
        {"op": "MatMulNBits", "width": 8, "nodes": 49, "us": 1500.0, "bytes": 60_000_000},
        {"op": "GroupQueryAttention", "width": 0, "nodes": 12, "us": 400.0, "bytes": 1_000_000},
        {"op": "Add", "width": 0, "nodes": 30, "us": 100.0, "bytes": 0},
    ]
    asked = []

    def profile(*given):
        asked.append(given)
        return {"token_ms": 2.1, "memory_gb_per_s": 50.0, "operators": operators}

    monkeypatch.setattr(inference_profile, "profile", profile)
    found = list(inference_profile.profiles(rows, {"a": tmp_path}))
    assert asked == [(tmp_path, "q4", 32, 64, 2), (tmp_path, "q4", 896, 64, 2)]
    path = write_table(tmp_path, [*rows, *found], summarise(rows))
    assert (
        "| a q4, decode 32+128 | 2.10 ms | reads 50.0 GB/s "
        "| 1.50 ms (75%), 49 nodes, 60.0 MB at 40.0 GB/s (0.80) "
        "| 0.40 ms (20%), 12 nodes, 1.0 MB at 2.5 GB/s (0.05) "
        "| 0.10 ms (5%), 30 nodes | attention, by 0.38 ms |"
    ) in path.read_text()
    with pytest.raises(UserError, match=r"--edge: gptopt a q4 needs a profile; give the folder a"):
        list(inference_profile.profiles(rows, {}))


def test_a_prompt_is_held_against_the_best_product_and_memory_is_told_by_stage():
    operators = [
        {"op": "DynamicQuantizeMatMul", "width": 8, "nodes": 48, "us": 4000.0, "ops": 2e9},
        {"op": "GroupQueryAttention", "width": 0, "nodes": 12, "us": 3000.0, "ops": 5e8},
        {"op": "Add", "width": 0, "nodes": 30, "us": 1000.0, "ops": 0},
    ]  # fmt: skip
    stages = [
        {"stage": "program", "private_mib": 34.6, "files_mib": 33.6, "peak_mib": 70.0},
        {"stage": "opened", "private_mib": 120.0, "files_mib": 40.0, "peak_mib": 230.4},
    ]
    rows = [
        {"contender": "gptopt a q8", "workload": "prefill 512", "first_ms": 8.5,
         "ops_per_s": 1e12, "operators": operators},
        {"contender": "gptopt a q4", "workload": "peak_mib", "stages": stages,
         "weights_mib": 73.4, "cache_mib": 18.0},
    ]  # fmt: skip
    text = "\n".join(limits(rows))
    assert (
        "| a q8, prefill 512 | 8.50 ms | multiplies 1000 G/s "
        "| 4.00 ms (50%), 48 nodes, 2.0 G at 500 G/s (0.50) "
        "| 3.00 ms (38%), 12 nodes, 0.5 G at 167 G/s (0.17) "
        "| 1.00 ms (12%), 30 nodes | attention, by 2.50 ms |"
    ) in text
    assert "| a q4 | program: 68 (35); 70, opened: 160 (120); 230 | 73 | 18 |" in text


def test_each_kind_of_goal_has_its_profile(tmp_path, monkeypatch):
    asked = []
    for name in ("profile", "profile_prompt", "profile_memory"):
        monkeypatch.setattr(
            inference_profile, name, lambda *given, of=name: asked.append((of, *given)) or {}
        )
    for workload in ("decode 32+128", "prefill 512", "peak_mib"):
        assert inference_profile._profiled(tmp_path, "q4", workload, 2) == {}
    assert inference_profile._profiled(tmp_path, "q4", "disk_mb", 2) is None
    assert asked == [
        ("profile", tmp_path, "q4", 32, 64, 2), ("profile_prompt", tmp_path, "q4", 512, 2),
        ("profile_memory", tmp_path, "q4", 2),
    ]  # fmt: skip


def test_goals_are_measured_against_the_fastest_peer_by_time_too():
    rows = [{}, *({"kind": "load", "contender": name} for name in ("gptopt a q8", "openvino int4"))]
    times = {"gptopt a q8": 100.0, "openvino int4": 80.0, "llamacpp q4_0": 210.0}
    summary = [
        {"workload": "prefill 512", "contender": name, "unit": "ms", "value": value}
        for name, value in times.items()
    ]
    one, two = reached(rows, summary)
    assert (one["over"], one["value"], one["reached"]) == ("openvino int4", 0.8, False)
    assert (two["over"], two["value"], two["reached"]) == ("llamacpp q4_0", 2.1, True)


def test_a_command_names_no_folder_of_the_machine(monkeypatch):
    from gptopt.bench import machine

    words = ["gptopt", "bench", "--work", "/a/b/work", "--peer-python", "llamacpp=/c/d/python", "x"]
    monkeypatch.setattr("sys.argv", words)
    said = machine.command_line()
    assert said == "gptopt bench --work work --peer-python llamacpp=python x"


def test_a_table_names_the_instructions_that_products_use(monkeypatch):
    from gptopt.bench import inference_report, machine

    told = "model name : P\nflags : fpu avx2 avx512_vnni avx512_vnni_x\n\nflags : fpu\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: told)
    assert machine._instructions() == ["avx2", "avx512_vnni"]
    named = inference_report._processor({"processor": "P", "instructions": ["avx2"]})
    assert (named, inference_report._processor({"processor": "P"})) == ("P (avx2)", "P")
