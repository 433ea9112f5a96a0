"""From a model to a proven folder: graphs in one or more precisions, and the files around them.

Nothing is left behind unless every proof holds.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir
from torch import nn
from torch.export import ExportedProgram

from gptopt.config import ModelConfig
from gptopt.config_classifier import labels_of, says_next
from gptopt.errors import CheckFailed, UserError
from gptopt.export.adapters import (
    NamedAdapter,
    add_slots,
    prove_adapters,
    refuse_target,
    write_adapters,
)
from gptopt.export.bisect import Departure, diagnose
from gptopt.export.budget import Budget
from gptopt.export.cache import quantize_cache
from gptopt.export.calibration import Calibration
from gptopt.export.card import model_card
from gptopt.export.folder import GraphFile, write_configs
from gptopt.export.front import front_svg
from gptopt.export.lookups import unfold_lookups
from gptopt.export.mobile import check_size, write_mobile
from gptopt.export.next_token import Tokens, add_next_token
from gptopt.export.pipeline import Build, build_graph
from gptopt.export.quality import HeldOut
from gptopt.export.quantize import Known, quantize_graph
from gptopt.export.reference import Answers
from gptopt.export.registry import check_kernels
from gptopt.export.report import Variant, graph_facts, report_of
from gptopt.export.samples import write_samples
from gptopt.export.search import CANDIDATES, Found, Measured, mixed, pareto_front, search
from gptopt.export.speed import tokens_per_s
from gptopt.export.targets import PORTABLE, Target, check_precisions, tell_size
from gptopt.export.trace import Exportable
from gptopt.export.validate import prove
from gptopt.export.write import save, wants_data_file
from gptopt.manifest import staged_folder, write_json, write_manifest, write_text
from gptopt.precisions import PRECISIONS, Allowed, BlockFormat, Precision, allowed_of
from gptopt.runtime.client_files import check_client_files
from gptopt.runtime.folder import KIND, check_names
from gptopt.runtime.graph import check_graph

if TYPE_CHECKING:
    from gptopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GRAPH = "onnx/model.onnx"
REPORT = "report.json"
FAILED_REPORT = "failed-report.json"  # EDGE_DIR.failed-report.json, beside the folder


@dataclass(frozen=True, slots=True)
class Plan:
    """What to export besides the target.

    Attributes:
        precisions: one file each; the first one is what clients take by default.
        calibration: statistics of a text, for better quantised weights and an int8 cache.
        held_out: a text that every file is measured on.
        int8_cache: keep keys and values in int8; needs a calibration.
        tokens: how the graph itself chooses the next token, an output beside the scores.
        mobile: write .ort files for phones too.
        keep_stages: folder that receives the graph of every stage.
        budget: chooses the format of each matrix of the precisions that are kept in blocks; needs
            a calibration and a held-out text.
        adapters: LoRA adapters of the model, a GPT, to switch between at run time.
    """

    precisions: Sequence[Precision] = (PRECISIONS["fp32"],)
    calibration: Calibration | None = None
    held_out: HeldOut | None = None
    int8_cache: bool = False
    tokens: Tokens = "none"
    keep_stages: Path | None = None
    budget: Budget | None = None
    adapters: Sequence[NamedAdapter] = ()
    mobile: bool = False


@dataclass(slots=True)
class Common:
    """What exports of one model for several targets need only once.

    Attributes:
        program: the recorded model.
        answers: what the model said in proofs.
    """

    program: ExportedProgram | None = None
    answers: Answers = field(default_factory=Answers)


def export_model(
    model: nn.Module,
    tokenizer: "Tokenizer | None",
    folder: Path,
    *,
    force: bool = False,
    target: Target = PORTABLE,
    plan: Plan | None = None,
    common: Common | None = None,
) -> dict[str, Any]:
    """Export a model to ONNX, prove the export, and write the folder only if the proof holds.

    Args:
        model: gptopt's GPT, or any module that keeps `trace.Exportable`; float32, eval().
        tokenizer: goes into the folder; without one the folder serves clients of token ids only.
        folder: the folder to write.
        force: replace the folder if it exists.
        target: what the graphs are made for.
        plan: precisions and the like; none: float32.
        common: what an export of the same model for another target has left.

    Returns:
        The report that is written to report.json.

    Raises:
        UserError: the folder exists, or the model cannot be exported as asked.
        CheckFailed: a graph does not say what the model says, or too little of it (the report then
            lies beside, see `failed_report`), or cannot run where it should; no folder is written.
    """
    plan, common = plan or Plan(), common or Common()
    config = _config_of(model, tokenizer)
    check_precisions(target, [each.name for each in plan.precisions])
    if plan.adapters:
        refuse_target(target)
    if plan.tokens != "none" and not says_next(config):
        raise UserError(f"--tokens {plan.tokens}: only a next-token model has a next token")
    if labels_of(config) and (plan.calibration or plan.held_out or plan.adapters):
        raise UserError("--calibration, --held-out and --adapter are for models of tokens alone")
    size = None if tokenizer is None else tokenizer.size
    with staged_folder(folder, force=force) as staging:
        build = Build(target, keep=plan.keep_stages, program=common.program)
        graph = build_graph(model, config, build)
        common.program = build.program
        if plan.int8_cache:
            graph = _with_int8_cache(graph, build, plan)
        (staging / GRAPH).parent.mkdir()
        for floats in {each.floats for each in plan.precisions}:
            write_adapters(staging, plan.adapters, floats)
        maker = _Maker(model, graph, build, plan, common.answers, staging, size)
        variants = []
        for precision in plan.precisions:
            variants.append(maker.make(precision))
            if variants[-1].failed:
                raise _failure(folder, staging, model, build, variants)
        files = [each.file for each in variants]
        names = [each.name for each in plan.adapters]
        write_configs(staging, config, tokenizer, target.name, files, names)
        write_samples(staging, labels=labels_of(config) is not None, phones=plan.mobile)
        mobile = write_mobile(staging, [each.facts for each in files]) if plan.mobile else None
        report = {**report_of(staging, model, build, variants), "mobile": mobile}
        write_json(staging / REPORT, report)
        card = model_card(config, report, tokenizer=tokenizer is not None)
        write_text(staging / "README.md", card)
        check_client_files(staging, config)
        check_names(staging)  # whoever opens the folder asks the same
        write_manifest(staging, KIND)
    failed_report(folder).unlink(missing_ok=True)  # of an earlier attempt
    return report


def failed_report(folder: Path) -> Path:
    """Where the report of an export goes that did not become a folder."""
    return folder.with_name(f"{folder.name}.{FAILED_REPORT}")


def _failure(
    folder: Path, staging: Path, model: nn.Module, build: Build, variants: Sequence[Variant]
) -> CheckFailed:
    """What to say of the last variant, after its report was written beside the folder."""
    last, path = variants[-1], failed_report(folder)
    report = report_of(staging, model, build, variants)
    report |= {"passed": False, "failed": last.file.precision, "departure": None}
    if last.proof.passed:
        assert last.quality is not None
        reason = (
            f"{last.file.precision} loses too much on held-out text: {last.quality.failure}; "
            f"choose a precision of more bits"
        )
    else:
        facts = last.file.facts
        found = diagnose(staging / facts.file, model, facts)
        report["departure"] = found.as_dict() if isinstance(found, Departure) else None
        reason = (
            f"{facts.file} does not say what the model says: {last.proof.failure}; {found}; this "
            f"is a fault of the export, please report it with the model's config.json"
        )
    try:
        write_json(path, report)
    except UserError as error:  # the reason matters more
        return CheckFailed(f"{folder}: not written, {reason}; its report neither: {error}")
    return CheckFailed(f"{folder}: not written, {reason}; see {path}")


@dataclass(slots=True)
class _Maker:
    """Makes the variants of one graph."""

    model: nn.Module
    graph: ir.Model
    build: Build
    plan: Plan
    answers: Answers
    folder: Path
    vocab_size: int | None
    known: Known = field(default_factory=dict)

    def make(self, precision: Precision) -> Variant:
        """Quantise, write and prove one file."""
        gc.collect()  # the graph of the file before this one: its nodes and values hold each other
        build = Build(self.build.target, notes=self.build.notes.copy(), keep=self.build.keep)
        found = None
        if self.plan.budget is not None and isinstance(precision.layers, BlockFormat):
            found = self._search(precision)
            precision = mixed(precision, found.front[found.place], found.budget)
            picture = front_svg(found, f"{precision.name}: which matrix in how many bits")
            write_text(self.folder / f"front_{precision.name}.svg", picture)
            build.done("search")
        graph, file = self._write(precision, build)
        tell_size(build.target, self.folder / file.facts.file, build.notes)
        if self.plan.mobile:
            check_size(self.folder / file.facts.file)
        path, target = file.facts.file, build.target
        logger.info("%s: %d nodes, now the proof", path, graph.graph.num_nodes())
        proof = prove(
            self.folder / path, self.model, vocab_size=self.vocab_size, file=file.facts,
            answers=self.answers,
        )  # fmt: skip
        chosen = self.plan.adapters if proof.passed else ()
        adapters = prove_adapters(
            self.folder / path, file.facts, self.model, chosen, self.vocab_size
        )
        build.done("prove")
        variant = Variant(
            file, graph_facts(graph, target), proof, build.notes, search=found,
            adapters=adapters, seconds=build.seconds,
        )  # fmt: skip
        if self.plan.held_out is not None and proof.passed:
            allowed = allowed_of(precision.name, file.facts.cache_dtype)
            if found is not None:
                allowed = precision.allowed
            variant.quality = self.plan.held_out.measure(self.folder / path, file.facts, allowed)
            build.done("measure")
        return variant

    def _search(self, precision: Precision) -> Found:
        """The mix of formats that keeps to the budget."""
        plan, config = self.plan, cast(Exportable, self.model).config
        assert plan.budget is not None
        assert plan.calibration is not None
        assert plan.held_out is not None
        held_out, budget = plan.held_out, plan.budget
        narrow = "q2" in self.build.target.precisions
        candidates = [form for form in CANDIDATES if narrow or form.bits > 2]
        front = pareto_front(self.graph.graph, plan.calibration, candidates)

        def build(place: int) -> Measured:
            mix = mixed(precision, front[place], budget)
            _, file = self._write(mix, Build(self.build.target))
            path = self.folder / file.facts.file
            timed = budget.kind == "tokens/s"
            return Measured(
                place=place,
                bytes=sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")),
                quality=held_out.measure(path, file.facts, Allowed()),
                tokens_per_s=tokens_per_s(path, config, file.facts) if timed else None,
            )

        return search(front, budget, build)

    def _write(self, precision: Precision, build: Build) -> tuple[ir.Model, GraphFile]:
        """Quantise the graph, and write it."""
        target, graph = build.target, self.graph
        if precision.quantized or precision.floats != "float32":
            graph = quantize_graph(
                graph, precision, build.notes, calibration=self.plan.calibration, known=self.known
            )
            if target.lookups == "primitives":
                unfold_lookups(graph)
            check_kernels(graph, target, build.notes)
            build.done(f"quantise-{precision.name}", graph)
        if self.plan.adapters:
            graph = add_slots(graph, self.plan.adapters, build.notes)
            check_kernels(graph, target, build.notes)
            build.done("adapters", graph)
        tokens = self.plan.tokens
        if tokens != "none":
            graph = add_next_token(graph, tokens, self.vocab_size, build.notes)
            check_kernels(graph, target, build.notes)
            build.done("next-token", graph)
        path = f"onnx/model{precision.suffix}.onnx"
        external = wants_data_file(graph, target.inline_limit_bytes)
        save(graph, self.folder / path, external=external)
        check_graph(self.folder / path)  # the runtime refuses what it was not meant to run
        build.done("write")
        dtype = "int8" if self.plan.int8_cache else precision.floats
        facts = target.facts(path, dtype).model_copy(update={"tokens": tokens})
        file = GraphFile(precision.name, facts, external)
        return graph, file


def _with_int8_cache(graph: ir.Model, build: Build, plan: Plan) -> ir.Model:
    if plan.calibration is None:
        raise UserError("--cache int8: needs a text to find the scales; give --calibration TEXT")
    if build.target.attention != "gqa":
        raise UserError(
            f"--cache int8: --target {build.target.name} cannot read one for this model; "
            f"use --cache fp32"
        )
    graph = quantize_cache(graph, plan.calibration.cache_ranges(), build.notes)
    check_kernels(graph, build.target, build.notes)
    build.done("int8-cache", graph)
    return graph


def _config_of(model: nn.Module, tokenizer: "Tokenizer | None") -> ModelConfig:
    config = getattr(cast(Exportable, model), "config", None)
    name = type(model).__name__
    if not isinstance(config, ModelConfig) or config.vocab_size is None:
        raise UserError(
            f"{name}.config: expected a gptopt ModelConfig with vocab_size, found "
            f"{type(config).__name__}; give the module one that states its sizes"
        )
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids, {name} only {config.vocab_size}; use the "
            f"tokenizer it was trained with"
        )
    return config
