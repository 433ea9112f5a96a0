"""`gptopt export` and `gptopt validate`."""

from pathlib import Path
from typing import Any

from gptopt.checkpoint import load_model
from gptopt.config import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.card import proof_table
from gptopt.export.package import GRAPH, export_model
from gptopt.export.validate import prove
from gptopt.log import say
from gptopt.runtime.folder import load_config, model_file, verify_folder


def export(options: ExportOptions) -> dict[str, Any]:
    """Export a model, and show the proof.

    Returns:
        The report (see README, "report.json") and `out`, the folder.

    Raises:
        UserError: no such model, or the folder exists.
        CheckFailed: the proof does not hold; no folder is written.
    """
    out = Path(options.out)
    if (out.exists() or out.is_symlink()) and not options.force:  # before a large model is read
        raise UserError(f"{out}: exists already; choose another folder, or replace it with --force")
    loaded = load_model(options.model, checkpoint=options.checkpoint, kernels="reference")
    report = export_model(loaded.model, loaded.tokenizer, out, force=options.force)
    if not options.json_output:
        say(proof_table(report))
        size = sum(report["files"].values())
        say(f"{out}: {report['parameters']:,} parameters, {size:,} bytes, proven")
    return {"out": str(out), **report}


def validate(options: ValidateOptions) -> dict[str, Any]:
    """Prove an exported folder again, and show the proof.

    Returns:
        `folder` and the proof's part of the report.

    Raises:
        UserError: no exported folder, no such model, or a model of other sizes.
        CheckFailed: the folder was changed, or does not say what the model says.
    """
    folder = Path(options.folder)
    verify_folder(folder)
    sizes = load_config(folder)
    loaded = load_model(options.model, checkpoint=options.checkpoint, kernels="reference")
    model = loaded.model
    for name in ("n_layer", "kv_heads", "head_size", "vocab_size", "block_size", "causal"):
        found = getattr(model.config, name)
        if found != sizes[name]:
            raise UserError(
                f"{folder}: was exported from a model with {name}={sizes[name]}, "
                f"{options.model} has {found}; give the model that it was exported from"
            )
    proof = prove(model_file(folder), model, vocab_size=sizes["tokenizer_size"])
    result = {"folder": str(folder), **proof.as_dict()}
    if not options.json_output:
        say(proof_table(result))
    if not proof.passed:
        raise CheckFailed(
            f"{folder}/{GRAPH}: does not say what {options.model} says: {proof.failure}; export "
            f"the model again"
        )
    if not options.json_output:
        say(f"{folder}: says what {options.model} says")
    return result
