"""`gptopt bench inference`: exported folders on a CPU beside the peers that are installed.

Every contender is a process of its own, stopped between its turns; they take turns within a round
and the order is reversed in every other round. Each figure is a median with its range, and a ratio
to one contender of the same run: memory on a shared machine is too fickle for figures alone. What
they say is compared with PyTorch's float32 before anything is measured.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gptopt.bench.inference_goals import reached
from gptopt.bench.inference_models import make_edges, make_gpt2
from gptopt.bench.inference_profile import profiles
from gptopt.bench.inference_report import summarise, write_chart, write_table
from gptopt.bench.machine import command_line, stamp
from gptopt.bench.processes import Worker, run_once, wait_for_quiet, worker_command
from gptopt.config_machine import InferenceOptions
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.manifest import read_json
from gptopt.runtime import settings
from gptopt.runtime.variants import edge_files

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# name -> (file in bench/peers, variants that are measured)
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch_eager", ("float32", "bfloat16")),
    "transformers": ("torch_eager", ("generate-float32",)),
    "llamacpp": ("llamacpp", ("f32", "q8_0", "q4_0", "q4_k_m")),
    "genai": ("genai", ("fp32", "int4")),
    "optimum": ("optimum_onnx", ("fp32", "int8")),
    "ctranslate2": ("ctranslate2_generator", ("float32", "int8")),
    "openvino": ("openvino_genai", ("fp32", "bf16", "int8", "int4")),
}
_AT_HOME = ("torch", "transformers")  # in this environment, if anywhere
WORKLOADS: dict[str, Row] = {
    "prefill 512": {"rows": 1, "tokens": 512, "new": 1},
    "decode 32+128": {"rows": 1, "tokens": 32, "new": 128},
    "decode 896+128": {"rows": 1, "tokens": 896, "new": 128},
    "batch 8 decode 32+64": {"rows": 8, "tokens": 32, "new": 64},
}
LOAD = "load + first token"
PROBE = "memory read"
_QUIET_CPUS, _RETRIES = 0.1, 2
_PROMPTS = 12  # whose first tokens are compared


@dataclass(frozen=True)
class Contender:
    """Who takes part: a file of bench/peers, in which Python, with which model."""

    name: str
    peer: str
    python: str
    model: Path
    variant: str
    comparable: bool = True  # runs the model's own weights

    def command(self) -> list[str]:
        """How its process is started."""
        return worker_command(self.python, self.peer, self.model, self.variant)

    def start(self, threads: int) -> Worker:
        """The process, loaded. PYTHONPATH is for preparing only: it would weigh on memory."""
        environment: dict[str, str | None] = {"PYTHONPATH": None}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = "1" if self.peer == "bandwidth" else str(threads)
        return Worker([*self.command(), "--threads", str(threads)], environment)


def inference(options: InferenceOptions) -> dict[str, Any]:
    """Prepare, compare what is said, and unless --check measure; write rows, table and chart.

    Returns:
        contenders, agreement (of each), and if measured: summary, anchor, goals, files.

    Raises:
        UserError: no contender, an unknown one, or an environment that is not there.
    """
    work = Path(options.work)
    source = Path(options.model) if options.model else work / "gpt2-124m"
    if not options.model:
        make_gpt2(source)
    if unknown := [name for name in options.workloads if name not in (*WORKLOADS, LOAD)]:
        names = ", ".join(repr(name) for name in (*WORKLOADS, LOAD))
        raise UserError(f"--workloads {unknown[0]!r}: unknown, choose from {names}")
    threads = options.threads or settings.cpus()
    contenders = list(_prepared(_contenders(options, source), source))
    if not contenders:
        raise UserError(
            "no contender is left; give --edge FOLDER, or --peer-python NAME=PYTHON for a peer"
        )
    if options.prepare_only:
        return {"contenders": [each.name for each in contenders]}
    vocab = read_json(source / "config.json")["vocab_size"] - 1
    agreement = compare(contenders, threads, vocab)
    result: dict[str, Any] = {
        "contenders": [each.name for each in contenders],
        "agreement": agreement,
    }
    if not options.check:
        result |= _measured(options, contenders, agreement, source, threads)
    elif not options.json_output:
        for line in agreement:
            said = line.get("error") or f"{line['same']} of {line['tokens']} tokens as PyTorch"
            say(f"{line['contender']}: {said}")
    return result


def _contenders(options: InferenceOptions, source: Path) -> Iterator[Contender]:
    pythons = dict(_pythons(options.peer_python))
    work = Path(options.work)
    wanted = options.contenders
    labels = {f"{name} {v}": (name, v) for name, (_, variants) in PEERS.items() for v in variants}
    if unknown := [name for name in wanted if name not in (*PEERS, *labels, "gptopt")]:
        raise UserError(
            f"--contenders {unknown[0]}: unknown, choose from gptopt, {_known()}, or one of their "
            f"variants, as in {next(iter(labels))!r}"
        )
    edges = options.edge
    if not edges and (not wanted or "gptopt" in wanted):
        edges = [str(folder) for folder in make_edges(source, work)]
    for given in edges:
        text, _, precision = given.partition(":")
        folder = Path(text)
        files = edge_files(folder)
        for name in [precision] if precision else files:
            if name not in files:
                raise UserError(f"--edge {given}: has {', '.join(files)}; choose one of them")
            if not wanted or "gptopt" in wanted:
                yield Contender(f"gptopt {folder.name} {name}", "edge", "", folder, name)
            told = read_json(folder / "config.json").get("gptopt_edge", {})
            able = told.get("target") == "portable" and (folder / "genai_config.json").is_file()
            if able and "genai" in pythons and (not wanted or "genai" in wanted):
                yield Contender(
                    f"genai, gptopt {name}", "genai", pythons["genai"], folder, files[name].file
                )
    for label, (name, variant) in labels.items():
        there = name in pythons or name in _AT_HOME
        if there and (not wanted or name in wanted or label in wanted):
            peer, python = PEERS[name][0], pythons.get(name, "")
            model = source if peer == "torch_eager" else work / f"{peer}-{variant}"
            yield Contender(label, peer, python, model, variant, comparable=name != "genai")


def _pythons(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in given:
        name, equals, python = text.partition("=")
        if not equals or name not in PEERS:
            raise UserError(f"--peer-python {text}: expected NAME=PYTHON with one of {_known()}")
        if not Path(python).is_file():
            raise UserError(f"--peer-python {text}: no such program; make the environment first")
        yield name, python


def _known() -> str:
    return ", ".join(PEERS)


def _prepared(contenders: Iterator[Contender], source: Path) -> Iterator[Contender]:
    """Those whose model is there or could be made."""
    for each in contenders:
        if each.model.exists():
            yield each
            continue
        logger.info("preparing %s", each.name)
        each.model.parent.mkdir(parents=True, exist_ok=True)
        staged = each.model.with_name(f".part-{each.model.name}")
        command = worker_command(each.python, each.peer, source, each.variant)
        failure = run_once([*command, "--prepare", str(staged)])
        if failure is None and staged.exists():
            staged.replace(each.model)
        if each.model.exists():
            yield each
        else:
            logger.warning("%s takes no part: %s", each.name, failure or "it made no model")


def compare(contenders: Sequence[Contender], threads: int, vocab: int) -> list[Row]:
    """What each says beside PyTorch's float32: the first tokens of some prompts, one by one.

    A greedy text is no measure: after the first difference, all tokens differ. Those of 32 new
    tokens that agree before it are told too.
    """
    asked = [{"rows": 1, "tokens": 5 + 7 * n, "new": 1, "seed": 100 + n} for n in range(_PROMPTS)]
    asked += [{"rows": 1, "tokens": 32, "new": 32, "seed": 7}]
    asked += [{"rows": 3, "tokens": 9, "new": 4, "seed": 8}]
    said: dict[str, list[Any]] = {}
    rows: list[Row] = []
    ordered = sorted(contenders, key=lambda each: each.name != "torch float32")
    for each in ordered:
        with each.start(threads) as worker:
            answers = [worker.hello]
            if "error" not in worker.hello:
                answers += [worker.ask(**command, vocab=vocab) for command in asked]
        row: Row = {"contender": each.name, "version": worker.hello.get("version")}
        rows.append(row)
        if wrong := [answer["error"] for answer in answers if "error" in answer]:
            row["error"] = wrong[0]
            logger.warning("%s: %s", each.name, wrong[0])
            continue
        made = [answer["made"] for answer in answers[1:]]
        said[each.name] = made
        reference = said.get("torch float32")
        if reference is None or not each.comparable:
            row |= {"same": None, "tokens": _PROMPTS}
            continue
        pairs = zip(made[:_PROMPTS], reference[:_PROMPTS], strict=True)
        row |= {"same": sum(mine == theirs for mine, theirs in pairs), "tokens": _PROMPTS}
        row["distinct"] = len({str(each) for each in reference[:_PROMPTS]})
        row["greedy_prefix"] = _prefix(made[_PROMPTS][0], reference[_PROMPTS][0])
        row["batch_first"] = sum(
            mine[0] == theirs[0] for mine, theirs in zip(made[-1], reference[-1], strict=True)
        )
    return rows


def _prefix(one: list[int], other: list[int]) -> int:
    differing = [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return differing[0] if differing else len(one)


def _measured(
    options: InferenceOptions,
    contenders: Sequence[Contender],
    agreement: list[Row],
    source: Path,
    threads: int,
) -> dict[str, Any]:
    broken = {row["contender"] for row in agreement if "error" in row}
    racing = [each for each in contenders if each.name not in broken]
    ours = [each for each in racing if each.peer == "edge"]
    if ours and settings.measured("cpu") is None:
        from gptopt.runtime.tune import tune

        tune(ours[0].model, precision=ours[0].variant)
    anchor = options.anchor or (ours or racing)[0].name
    if anchor not in [each.name for each in racing]:
        names = ", ".join(each.name for each in racing)
        raise UserError(f"--anchor {anchor!r}: does not take part; choose from {names}")
    racing.append(Contender(PROBE, "bandwidth", "", source, "read", comparable=False))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "inference.jsonl"
    with path.open("w", encoding="utf-8") as file:
        config = read_json(source / "config.json")
        shape = {key: config[key] for key in ("n_layer", "n_embd", "n_head", "vocab_size")}
        head = {"machine": stamp(), "threads": threads, "anchor": anchor, "shape": shape,
                "command": command_line()}  # fmt: skip
        rows = [head, *({"kind": "agreement", **row} for row in agreement)]
        for row in rows:
            _write(file, row)
        for row in _race(options, racing, threads, config["vocab_size"] - 1):
            rows.append(row)
            _write(file, row)
        for row in profiles(rows, {each.model.name: each.model for each in ours}):
            rows.append(row)
            _write(file, row)
    summary = summarise(rows)
    files = [path, write_table(out, rows, summary), write_chart(out, rows, summary)]
    if not options.json_output:
        say(files[1].read_text(encoding="utf-8"))
    return {
        "anchor": anchor,
        "summary": summary,
        "goals": reached(rows, summary),
        "files": [str(path) for path in files],
    }


def _write(file: TextIO, row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _race(
    options: InferenceOptions, racing: Sequence[Contender], threads: int, vocab: int
) -> Iterator[Row]:
    """Every sample of every round, as it is taken."""
    chosen = options.workloads or [*WORKLOADS, LOAD]
    workloads = {
        name: {**command, "vocab": vocab} for name, command in WORKLOADS.items() if name in chosen
    }
    ends = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for each in racing:
            worker = workers[each.name] = stack.enter_context(each.start(threads))
            yield {"kind": "load", "contender": each.name, **worker.hello}
            for command in workloads.values():  # the first turn warms up
                if command["rows"] == 1:
                    worker.ask(**command, seed=0)
            peak = worker.ask(memory=1).get("peak_mib")
            yield {"kind": "memory", "contender": each.name, "peak_mib": peak}
            for command in workloads.values():
                if command["rows"] > 1:
                    worker.ask(**command, seed=0)
        for turn in range(options.rounds):
            if time.monotonic() > ends:
                logger.warning("the time is over after %d rounds", turn)
                break
            for name, command in workloads.items():
                for each in racing[:: -1 if turn % 2 else 1]:
                    yield _sample(each, name, turn, workers[each.name], command)
            if LOAD in chosen:
                for each in racing[:: -1 if turn % 2 else 1]:
                    if each.peer != "bandwidth":
                        yield _loading(each, turn, threads, vocab)
            logger.info("round %d of %d", turn + 1, options.rounds)


def _sample(each: Contender, name: str, turn: int, worker: Worker, command: Row) -> Row:
    """The least disturbed of a few tries."""
    best: Row = {}
    for _ in range(_RETRIES + 1):
        wait_for_quiet(2 * _QUIET_CPUS, 10)
        answer = worker.ask(**command, seed=turn)
        answer.pop("made", None)
        if not best or answer["other_cpu"] < best["other_cpu"]:
            best = answer
        if "error" in answer or answer["other_cpu"] <= _QUIET_CPUS:
            break
    return {"kind": "sample", "contender": each.name, "workload": name, "round": turn, **best}


def _loading(each: Contender, turn: int, threads: int, vocab: int) -> Row:
    """A process of its own loads the model and reads 32 tokens; imports are told, not counted."""
    wait_for_quiet(2 * _QUIET_CPUS, 10)
    with each.start(threads) as worker:
        answer = {}
        if "error" not in worker.hello:
            answer = worker.ask(rows=1, tokens=32, new=1, seed=turn, vocab=vocab)
    row = {"kind": "sample", "contender": each.name, "workload": LOAD, "round": turn}
    if wrong := worker.hello.get("error") or answer.get("error"):
        return {**row, "error": wrong, "other_cpu": 0.0}
    value = worker.hello["load_s"] * 1e3 + answer["first_ms"]
    return {**row, "first_ms": value, "import_s": worker.hello["import_s"],
            "other_cpu": answer["other_cpu"]}  # fmt: skip
