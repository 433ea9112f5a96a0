"""The verbs of the command line, as text: a verb's module is imported when the verb is chosen.

That keeps `--help` instant, and no import arrow runs from the command line's table upwards.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptopt.config import Options


@dataclass(frozen=True)
class Verb:
    """Where a verb lives, its options, and which of them stand without a flag."""

    function: str  # "module:function", called with the options, returns the JSON object
    options: str  # a class of gptopt.config, or "module:Class" of another module of gptopt
    positional: str | None = None
    extra: str | None = None  # the packages it needs beyond the base: gptopt[extra]

    @property
    def options_class(self) -> "type[Options]":
        """The class, imported now."""
        module, _, name = self.options.rpartition(":")
        found: type[Options] = getattr(
            importlib.import_module(f"gptopt.{module or 'config'}"), name
        )
        return found


VERBS = {
    "demo": Verb("gptopt.demo:demo", "DemoOptions", extra="train,export"),
    "tokenize": Verb("gptopt.data:tokenize", "TokenizeOptions", "inputs"),
    "train": Verb("gptopt.training:train", "TrainOptions", "inputs", extra="train"),
    "plot": Verb("gptopt.training.plot:plot", "PlotOptions", "runs", extra="train"),
    "finetune sft": Verb(
        "gptopt.finetune:sft", "config_finetune:SftOptions", "inputs", extra="train"
    ),
    "finetune classify": Verb(
        "gptopt.finetune:classify", "config_finetune:ClassifyOptions", "inputs", extra="train"
    ),
    "generate": Verb("gptopt.generate:generate", "GenerateOptions", "model", extra="train"),
    "evaluate": Verb("gptopt.evaluate:evaluate", "EvaluateOptions", "model", extra="train"),
    "merge": Verb("gptopt.lora.verb:merge", "config_export:MergeOptions", "model", extra="train"),
    "export": Verb(
        "gptopt.export.verbs:export", "config_export:ExportOptions", "model", extra="train,export"
    ),
    "validate": Verb(
        "gptopt.export.verbs:validate",
        "config_export:ValidateOptions",
        "folder",
        extra="train,export",
    ),
    "run": Verb("gptopt.runtime.verbs:run", "RunOptions", "folder", extra="edge"),
    "chat": Verb("gptopt.chat:chat", "config_chat:ChatOptions", "model", extra="train,edge"),
    "bench": Verb("gptopt.bench.verb:bench", "config_machine:BenchOptions", "what", extra="train"),
    "bench quality": Verb(
        "gptopt.bench.quality:quality",
        "config_machine:QualityOptions",
        "models",
        extra="train,export",
    ),
    "bench inference": Verb(
        "gptopt.bench.inference:inference",
        "config_machine:InferenceOptions",
        extra="train,export,bench",
    ),
    "doctor": Verb("gptopt.doctor:doctor", "config_machine:DoctorOptions"),
}
