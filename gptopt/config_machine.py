"""Options of the verbs that examine this machine: doctor and bench."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gptopt.config import Options


class DoctorOptions(Options):
    """What is installed, and which operator body would run here and why."""

    kernels: bool = Field(
        False,
        description="prove each operator's Triton kernels on this machine, and keep the proof",
    )
    tune: bool = Field(
        False,
        description="with --kernels: time other configurations on this GPU, keep faster right ones",
    )
    compile_only: bool = Field(
        False,
        description="with --kernels: compile them for every GPU instead, with none present; all "
        "of it is an hour on one core (TRITON_CACHE_DIR keeps what was compiled)",
    )
    arch: list[Literal["sm_80", "sm_90", "sm_100", "gfx942"]] = Field(
        [], description="with --compile-only: for this architecture only (may be repeated)"
    )
    operator: list[Literal["attention", "cross_entropy", "ffn", "layernorm", "rotary"]] = Field(
        [], description="with --compile-only: this operator's only (may be repeated)"
    )
    output: str | None = Field(
        None, description="with --compile-only: JSON file with a row for each kernel, gone on with"
    )
    workers: int = Field(1, ge=1, description="with --compile-only: processes side by side")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.compile_only and not self.kernels:
            raise ValueError("--compile-only compiles the kernels; say --kernels --compile-only")
        if self.tune and (self.compile_only or not self.kernels):
            raise ValueError("--tune goes with --kernels, without --compile-only")
        narrowed = self.arch or self.operator or self.output or self.workers > 1
        if narrowed and not self.compile_only:
            raise ValueError(
                "--arch, --operator, --output and --workers are of --kernels --compile-only; add it"
            )
        return self


class BenchOptions(Options):
    """Measure kernels, training or generation beside their peers, and draw a report.

    A CPU runs the same code on tiny shapes, which says nothing about the kernels.
    """

    what: Literal["kernels", "training", "generate"] = Field(
        description="kernels (each operator), training (a whole step) or generate (decoding)"
    )
    out: str = Field("bench/results", description="folder for the rows and the report")
    device: str = Field("auto", description="cpu, cuda, cuda:N or auto")
    quick: bool = Field(False, description="only the shapes that a target speaks about")
    minutes: float | None = Field(
        None, gt=0, description="start no new measurement after this time"
    )
    append: bool = Field(False, description="add to the rows in the folder instead of replacing")
    only: list[str] = Field(
        default_factory=list, description="of kernels: an operator to measure; repeat for more"
    )
    contenders: list[str] = Field(
        default_factory=list, description="a contender to measure; repeat for more (none: all)"
    )
    rounds: int = Field(0, ge=0, le=10_000, description="rounds of turns (0: as time allows)")
    nanogpt: str | None = Field(None, description="of training: a checkout of nanoGPT to run too")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class QualityOptions(Options):
    """Measure what quantised files leave of a trained model, beside llama.cpp's formats."""

    models: list[str] = Field(description="trained model folder or run folder; repeat for more")
    held_out: str = Field(description="text file to measure on")
    calibration: str = Field(description="text file to calibrate on, of the same kind")
    precision: str = Field("q8,q4,q4-fast,q2", description="presets, comma-separated")
    budget: list[str] = Field(
        default_factory=list, description="a mix of q4 by ppl=1% or bytes=80MB; repeat for more"
    )
    peer_python: str | None = Field(
        None, description="llamacpp=PYTHON of an environment with llama-cpp-python and gguf"
    )
    out: str = Field("bench/results", description="folder for quality.json and quality.svg")
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class InferenceOptions(Options):
    """Measure exported folders on a CPU beside the runtimes that are installed."""

    edge: list[str] = Field(
        default_factory=list,
        description="exported folder, or FOLDER:PRECISION; repeat for more (none: the presets of"
        " the goals, made of the model in --work)",
    )
    peer_python: list[str] = Field(
        default_factory=list,
        description="NAME=PYTHON of an environment with llamacpp, genai, optimum, ctranslate2 or"
        " openvino; repeat for more",
    )
    work: str = Field("bench-work", description="folder for the models that the bench makes")
    model: str | None = Field(
        None, description="GPT-2 in a Hugging Face folder (none: 124M, random, made in --work)"
    )
    out: str = Field("bench/results", description="folder for rows, table and chart")
    contenders: list[str] = Field(
        default_factory=list,
        description="a contender, or one variant of it ('torch float32'); repeat for more (none:"
        " all)",
    )
    workloads: list[str] = Field(
        default_factory=list, description="a workload to measure; repeat for more (none: all)"
    )
    anchor: str | None = Field(
        None, description="contender that ratios refer to (none: the first exported folder)"
    )
    rounds: int = Field(5, gt=0, le=1000, description="turns of each contender")
    minutes: float | None = Field(None, gt=0, description="start no new round after this time")
    threads: int = Field(0, ge=0, description="of every contender (0: all this process may use)")
    prepare_only: bool = Field(False, description="make the peers' models and stop")
    check: bool = Field(False, description="compare what is said, measure nothing")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")
