"""Options of the verbs that make something of a trained model: export, validate, merge."""

from typing import Literal

from pydantic import Field

from gptopt.config import Options


class ExportOptions(Options):
    """Export a model to ONNX, prove the export, and write the folder only if the proof holds."""

    model: str = Field(
        description="model, run, adapter or Hugging Face folder, or hf:org/name; an adapter is "
        "merged into its base"
    )
    adapter: str | None = Field(
        None,
        description="LoRA adapters to switch between at run time: NAME=FOLDER, comma-separated",
    )
    out: str = Field(description="exported folder to write; of several targets: holds one each")
    target: str = Field(
        "portable",
        description="what the graphs are made for, comma-separated: portable, ort-cpu, ort-cuda, "
        "web, standard, standard-growing, legacy",
    )
    precision: str = Field(
        "fp32",
        description="files to write, comma-separated, the default one first: fp32, fp16, q8, q4, "
        "q4-fast, q4f16, q2",
    )
    cache: Literal["fp32", "int8"] = Field(
        "fp32", description="keys and values as computed, or in int8 (needs --calibration)"
    )
    calibration: str | None = Field(
        None, description="text file that shows how the model is used, for better quantised weights"
    )
    budget: str | None = Field(
        None,
        description="choose the format of each matrix of q4, q4f16 or q2 by what it may cost: "
        "ppl=1% (above PyTorch's, on held-out text), bytes=80MB or tokens/s=300; needs "
        "--calibration",
    )
    held_out: str | None = Field(
        None,
        description="text file to measure the files on (none: a quarter of --calibration, which is "
        "then not calibrated on)",
    )
    tokens: Literal["none", "greedy", "sample"] = Field(
        "none",
        description="let the graph choose the next token too, as an output beside the scores: the "
        "likeliest, or drawn by its inputs seed, temperature, top_k and top_p; gptopt run "
        "leaves it aside and draws from the scores, as gptopt generate does",
    )
    ort_mobile: bool = Field(
        False,
        description="for phones: .ort files, the operators that a reduced onnxruntime needs, and "
        "samples in Kotlin and Swift",
    )
    keep_stages: str | None = Field(
        None, description="folder that receives the graph of every stage"
    )
    force: bool = Field(False, description="replace the folder if it exists")
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class ValidateOptions(Options):
    """Prove again that an exported folder says what the model says."""

    folder: str = Field(description="exported folder")
    model: str = Field(description="the model it was exported from")
    adapter: str | None = Field(
        None, description="adapters to prove too, as `gptopt export` was given them"
    )
    precision: str = Field("all", description="files to prove, comma-separated, or all")
    held_out: str | None = Field(
        None, description="text file to measure perplexity, divergence and agreement on"
    )
    clients: str | None = Field(
        None, description="programs to play the folder in too, comma-separated, or all"
    )
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class MergeOptions(Options):
    """Add a LoRA adapter to the weights of its base: a plain model folder."""

    model: str = Field(description="an adapter or its run; or, with --adapter, its base")
    adapter: str | None = Field(None, description="the adapter, where the model is its base")
    out: str = Field(description="model folder to write")
    force: bool = Field(False, description="replace the folder if it exists")
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")
