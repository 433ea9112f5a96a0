"""The verbs of the command line, as text: a verb's module is imported when the verb is chosen.

That keeps `--help` instant, and no import arrow runs from the command line's table upwards.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """Where a verb lives, its options in gptopt.config, and which of them stand without a flag."""

    function: str  # "module:function", called with the options, returns the JSON object
    options: str
    positional: str | None = None
    extra: str | None = None  # the packages it needs beyond the base: gptopt[extra]


VERBS = {
    "demo": Verb("gptopt.demo:demo", "DemoOptions", extra="train,export"),
    "tokenize": Verb("gptopt.data:tokenize", "TokenizeOptions", "inputs"),
    "train": Verb("gptopt.training:train", "TrainOptions", "inputs", extra="train"),
    "generate": Verb("gptopt.generate:generate", "GenerateOptions", "model", extra="train"),
    "evaluate": Verb("gptopt.evaluate:evaluate", "EvaluateOptions", "model", extra="train"),
    "export": Verb("gptopt.export.verbs:export", "ExportOptions", "model", extra="train,export"),
    "validate": Verb(
        "gptopt.export.verbs:validate", "ValidateOptions", "folder", extra="train,export"
    ),
    "run": Verb("gptopt.runtime.verbs:run", "RunOptions", "folder", extra="edge"),
    "bench": Verb("gptopt.bench.verb:bench", "BenchOptions", "what", extra="train"),
    "bench inference": Verb(
        "gptopt.bench.inference:inference", "InferenceOptions", extra="train,export,bench"
    ),
    "doctor": Verb("gptopt.doctor:doctor", "DoctorOptions"),
}
