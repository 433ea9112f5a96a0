"""`gptopt export` and `gptopt validate`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptopt.checkpoint import LoadedModel, load_model
from gptopt.config_classifier import labels_of, says_next
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.adapters import adapters_of, prove_adapters
from gptopt.export.bisect import explain
from gptopt.export.budget import parse_budget
from gptopt.export.calibration import Calibration
from gptopt.export.card import proof_table, quality_line
from gptopt.export.clients import Client, check_clients, client_table, find_clients
from gptopt.export.mobile import check_target
from gptopt.export.package import REPORT, Common, Plan, export_model
from gptopt.export.quality import HeldOut
from gptopt.export.reference import Answers
from gptopt.export.targets import check_precisions, find_targets
from gptopt.export.texts import MIN_CALIBRATION, MIN_HELD_OUT, MIN_SPLIT, read_ids, split
from gptopt.export.validate import prove
from gptopt.log import say
from gptopt.lora import merge_lora
from gptopt.manifest import read_json
from gptopt.model import GPT
from gptopt.precisions import (
    Allowed,
    BlockFormat,
    Precision,
    allowed_of,
    find_precisions,
)
from gptopt.runtime.adapters import adapter_names
from gptopt.runtime.client_files import check_client_files
from gptopt.runtime.folder import load_config, load_tokenizer, model_file, verify_folder
from gptopt.runtime.variants import EdgeFile, edge_files

logger = logging.getLogger(__name__)


def export(options: ExportOptions) -> dict[str, Any]:
    """Export a model, and show the proof.

    Returns:
        The report (see README, "JSON output") and `out`, the folder; of several targets `out` and
        under `targets` the report of each.

    Raises:
        UserError: no such model, a folder exists, or a target cannot do what was asked for.
        CheckFailed: a proof does not hold; that folder is not written.
    """
    targets, precisions = find_targets(options.target), find_precisions(options.precision)
    for target in targets:
        check_precisions(target, [each.name for each in precisions])
        if options.ort_mobile:
            check_target(target)
    out = Path(options.out)
    folders = {each.name: out / each.name if len(targets) > 1 else out for each in targets}
    for folder in folders.values():  # before a large model is read
        if (folder.exists() or folder.is_symlink()) and not options.force:
            raise UserError(
                f"{folder}: exists already; choose another folder, or replace it with --force"
            )
    loaded = _merged(options.model, options.checkpoint)
    plan = _plan(options, loaded, precisions)
    reports, common = {}, Common()
    for target in targets:
        report = export_model(
            loaded.model, loaded.tokenizer, folders[target.name], force=options.force,
            target=target, plan=plan, common=common,
        )  # fmt: skip
        reports[target.name] = report
        if not options.json_output:
            _show(folders[target.name], report)
    if len(targets) == 1:
        return {"out": str(out), **reports[targets[0].name]}
    return {"out": str(out), "targets": reports}


def _plan(options: ExportOptions, loaded: LoadedModel, precisions: list[Precision]) -> Plan:
    calibration = held_out = budget = None
    if options.budget is not None:
        budget = parse_budget(options.budget)
        if not any(isinstance(each.layers, BlockFormat) for each in precisions):
            raise UserError(
                f"--budget {budget}: --precision {options.precision} leaves nothing to choose; ask "
                f"for q4"
            )
        if options.calibration is None:
            raise UserError(
                f"--budget {budget}: needs a text to find what matters; give --calibration TEXT"
            )
    given, apart = options.calibration, options.held_out is not None
    if given is not None:
        least = MIN_CALIBRATION if apart else MIN_SPLIT
        used = read_ids("--calibration", given, loaded, least)
        if not apart:
            used, rest = split(used)
            held_out = HeldOut(loaded.model, rest)
        calibration = Calibration(loaded.model, used)
    if options.held_out is not None:
        ids = read_ids("--held-out", options.held_out, loaded, MIN_HELD_OUT)
        held_out = HeldOut(loaded.model, ids)
    keep = None if options.keep_stages is None else Path(options.keep_stages)
    adapters = adapters_of(options.adapter, loaded.model)
    return Plan(
        precisions, calibration, held_out, options.cache == "int8", options.tokens, keep,
        budget=budget, adapters=adapters,
        mobile=options.ort_mobile,
    )  # fmt: skip


def _merged(model: str, checkpoint: str) -> LoadedModel:
    """The model, with the adapter that it may be merged into its base."""
    loaded = load_model(model, checkpoint=checkpoint, kernels="reference")
    if loaded.model.lora is not None:
        logger.info("%s: an adapter, merged into its base %s", model, loaded.folder)
        merge_lora(loaded.model)
    return loaded


def _show(folder: Path, report: dict[str, Any]) -> None:
    for name, variant in report["variants"].items():
        if len(report["variants"]) > 1:
            say(f"{name}: {variant['file']}")
        say(proof_table(variant))
        if variant["quality"] is not None:
            say(quality_line(variant["quality"]))
        for note in variant["notes"]:
            say(f"{note['stage']}: {note['where']}: {note['what']}; {note['reason']}")
    size = sum(report["files"].values())
    say(f"{folder}: {report['parameters']:,} parameters, {size:,} bytes, proven")


_SAME = ("n_layer", "kv_heads", "head_size", "vocab_size", "block_size")


def validate(options: ValidateOptions) -> dict[str, Any]:
    """Prove an exported folder again, and show the proof.

    Returns:
        `folder`, the first file's proof, under `variants` the proof of each file, and under
        `clients` what each of them said of each file, where they were asked for.

    Raises:
        UserError: no exported folder, no such model or client, or a model of other sizes.
        CheckFailed: the folder was changed, or does not say what the model says.
    """
    folder = Path(options.folder)
    clients = [] if options.clients is None else find_clients(options.clients)
    verify_folder(folder)
    sizes = load_config(folder)
    files = _chosen(folder, options.precision)
    loaded = _merged(options.model, options.checkpoint)
    model = loaded.model
    adapters = adapters_of(options.adapter, model)
    if unknown := [each.name for each in adapters if each.name not in adapter_names(folder)]:
        raise UserError(
            f"--adapter {unknown[0]}: {folder} carries {', '.join(adapter_names(folder)) or 'none'}"
        )
    shape = {name: getattr(model.config, name) for name in _SAME}
    shape |= {"causal": says_next(model.config), "labels": labels_of(model.config)}
    there: Mapping[str, Any] = sizes
    for name, found in shape.items():
        if found != there[name]:
            raise UserError(
                f"{folder}: was exported from a model with {name}={there[name]}, "
                f"{options.model} has {found}; give the model that it was exported from"
            )
    check_client_files(folder, model.config)
    tokenizer = load_tokenizer(folder, sizes["tokenizer_size"])
    if tokenizer and loaded.tokenizer and tokenizer.sha256 != loaded.tokenizer.sha256:
        raise CheckFailed(
            f"{folder / 'tokenizer.json'}: is not the tokenizer of {options.model}; export the "
            f"model again"
        )
    held_out = None
    if options.held_out is not None:
        ids = read_ids("--held-out", options.held_out, loaded, MIN_HELD_OUT)
        held_out = HeldOut(model, ids)
    proofs: dict[str, dict[str, Any]] = {}
    answers = Answers()
    for name, file in files.items():
        path = model_file(folder, file.file)
        proof = prove(path, model, vocab_size=sizes["tokenizer_size"], file=file, answers=answers)
        proofs[name] = {**proof.as_dict(), "quality": None}
        if not options.json_output:
            say(f"{name}: {file.file}\n" * (len(files) > 1) + proof_table(proofs[name]))
        if not proof.passed:
            raise CheckFailed(
                f"{folder}/{file.file}: does not say what {options.model} says: {proof.failure}; "
                f"{explain(path, model, file)}; export the model again"
            )
        size = sizes["tokenizer_size"]
        proofs[name]["adapters"] = prove_adapters(path, file, model, adapters, size)
        if held_out is not None:
            quality = held_out.measure(path, file, _allowed(folder, name, file))
            proofs[name]["quality"] = quality.as_dict()
            if not options.json_output:
                say(quality_line(proofs[name]["quality"]))
            if quality.failure is not None:
                raise CheckFailed(
                    f"{folder}/{file.file}: loses too much on {options.held_out}: "
                    f"{quality.failure}; export the model in a precision of more bits"
                )
    result = {"folder": str(folder), **next(iter(proofs.values())), "variants": proofs}
    if clients:
        result["clients"] = {
            name: _play_in(folder, model, clients, name, quiet=options.json_output)
            for name in files
        }
    if not options.json_output:
        say(f"{folder}: says what {options.model} says")
    return result


def _allowed(folder: Path, name: str, file: EdgeFile) -> Allowed:
    """What the export allowed the file to lose, or what it would allow."""
    told = read_json(folder / REPORT).get("variants", {}).get(name, {}).get("quality")
    return allowed_of(name, file.cache_dtype) if told is None else Allowed(**told["allowed"])


def _play_in(
    folder: Path, model: GPT, clients: list[Client], precision: str, *, quiet: bool
) -> list[dict[str, Any]]:
    said = check_clients(folder, model, clients, precision=precision)
    if not quiet:
        say(f"{precision}:\n{client_table(said)}")
    for each in said:
        if not each.passed and each.limit is None:
            raise CheckFailed(
                f"{folder}: {precision} in {each.client}, {each.case}: {each.error}; export the "
                f"model again, or try the versions of {each.client} that `make clients` installs"
            )
    return [each.as_dict() for each in said]


def _chosen(folder: Path, precision: str) -> dict[str, EdgeFile]:
    files = edge_files(folder)
    if precision == "all":
        return files
    names = [name.strip() for name in precision.split(",")]
    for name in names:
        if name not in files:
            raise UserError(
                f"--precision {name}: {folder} has {', '.join(files)}; choose one of these, or all"
            )
    return {name: files[name] for name in names}
