"""What people read of a proof: a table on the terminal, and README.md of the exported folder."""

from collections.abc import Mapping
from typing import Any

from gptopt.config import ModelConfig
from gptopt.config_classifier import labels_of

_ATTENTION = {
    "gqa": "com.microsoft.GroupQueryAttention",
    "standard": "the standard Attention",
    "scatter": "the standard Attention, TensorScatter filling its cache",
    "primitives": "MatMul and Softmax",
}


def proof_table(proof: Mapping[str, Any]) -> str:
    """One line for each case of a proof (`Proof.as_dict`), and one for greedy decoding."""
    lines = [f"{'case':<24}{'error':>10}{'budget':>10}{'positions':>11}"]
    lines += [
        f"{each['case']:<24}{each['max_abs_error']:>10.1e}{each['budget']:>10.1e}"
        f"{each['positions']:>11}  {'ok' if each['passed'] else 'FAILED'}"
        for each in proof["cases"]
    ]
    if (greedy := proof["greedy"]) is not None:
        lines.append(
            f"greedy tokens agreeing: {greedy['agreeing']} of {greedy['tokens']} "
            f"({greedy['distinct']} distinct{_ties(greedy)})"
        )
    if (chosen := proof["next_tokens"]) is not None:
        lines.append(
            f"next_tokens chosen as the scores say: {chosen['agreeing']} of {chosen['tokens']}"
            f"{_ties(chosen)}"
        )
    return "\n".join(lines)


def quality_line(quality: Mapping[str, Any]) -> str:
    """What a file makes of held-out text (`Quality.as_dict`), in a line."""
    parts = []
    if quality["perplexity"] is not None:
        parts.append(
            f"perplexity {quality['perplexity']:.5g} ({quality['increase']:+.2%}, PyTorch "
            f"{quality['model_perplexity']:.5g})"
        )
    parts.append(f"KL {quality['mean_kl']:.1e} (largest {quality['max_kl']:.1e})")
    parts.append(f"{quality['agreement']:.1%} of {quality['positions']} tokens agree")
    return "held-out text: " + ", ".join(parts)


def model_card(config: ModelConfig, report: Mapping[str, Any], *, tokenizer: bool) -> str:
    """The card as Markdown, every number from the report."""
    task = "text-generation" if config.causal else "fill-mask"
    task = task if labels_of(config) is None else "text-classification"
    header = f"---\nlibrary_name: onnxruntime\npipeline_tag: {task}\ntags:\n- gptopt\n- onnx\n---"
    parts = [
        header,
        f"# A GPT of {report['parameters']:,} parameters, as ONNX",
        _facts(config, report),
        "## Run it\n\n" + _usage(config, report, tokenizer),
        "## What was proven\n\n" + _proof(report),
    ]
    if report["adapters"]:
        parts.insert(-1, "## Adapters\n\n" + _adapters(report))
    measured = {
        name: each["quality"] for name, each in report["variants"].items() if each["quality"]
    }
    if measured:
        parts.append("## How good it is\n\n" + _quality(measured))
    parts += [_mix(name, each["search"]) for name, each in report["variants"].items()
              if each.get("search")]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _facts(config: ModelConfig, report: Mapping[str, Any]) -> str:
    graph = report["graph"]
    heads = f"{config.n_head} heads"
    if config.kv_heads != config.n_head:
        heads += f" ({config.kv_heads} for keys and values)"
    attention = _ATTENTION[graph["attention"]]
    kind = "next-token model" if config.causal else "bidirectional model (masked LM)"
    if labels := labels_of(config):
        kind = f"classifier of {len(labels)} labels"
    rows = [
        ("model", f"{kind}, {config.n_layer} layers of {config.n_embd} channels, {heads}"),
        ("details", f"{config.norm_position}-{config.norm}, {config.activation}, "
                    f"{config.position} positions"),
        ("context", f"{config.block_size} tokens"),
        ("vocabulary", f"{config.vocab_size} ids"),
        ("made for", f"`{graph['target']}`: opset {graph['opset']}, attention as {attention}"),
        *(
            (f"`{name}`", f"{each['file']}, {each['graph']['nodes']} nodes")
            for name, each in report["variants"].items()
        ),
        *((f"`{name}`", f"{size:,} bytes") for name, size in report["files"].items()
          if name.startswith("onnx/")),
    ]  # fmt: skip
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _usage(config: ModelConfig, report: Mapping[str, Any], tokenizer: bool) -> str:
    static, right = report["cache"] == "static", report["padding"] == "right"
    inputs = "`input_ids`, `attention_mask` and `position_ids` (int64)"
    if labels_of(config):
        return (
            f"The graph takes {inputs} and gives `logits`, a score of each label for each text; "
            f"config.json names the labels (`id2label`).\n\n"
            "```\npip install 'gptopt[edge]'\ngptopt run THIS_FOLDER --prompt \"some text\"\n```"
            "\n\n`samples/run.py` needs onnxruntime and numpy alone."
        )
    if not config.causal:
        return f"The graph takes {inputs} and gives `logits`."
    graph = (
        f"One graph serves prefill and decode. It takes {inputs} and the cache "
        f"`past_key_values.{{i}}.key|value`, {_AT_FIRST[static]}, and gives `logits` and "
        f"`present.{{i}}.key|value`. `position_ids` count real tokens from 0: "
        f"`cumsum(attention_mask) - 1`. {_CACHES[report['cache'], right]}"
    )
    if not tokenizer:
        return f"The folder holds no tokenizer.\n\n{graph}"
    commands = (
        "```\n"
        "pip install 'gptopt[edge]'\n"
        'gptopt run THIS_FOLDER --prompt "Once upon a time"\n'
        "```\n\n"
        f"The same folder is laid out for {_CLIENTS[static]}."
    )
    return f"{commands}\n\n{graph}"


_ANYWHERE = "Padding may stand on either side."
_ONE_BUFFER = (
    "One buffer may be bound as past and present; several tokens behind a cache are fed to one "
    "row at a time."
)
_AT_FIRST = {False: "empty at first", True: "zeros at first"}
_CLIENTS = {
    False: "onnxruntime-genai, transformers.js and optimum-onnx",
    True: "onnxruntime-genai",
}
_CACHES = {
    ("growing", False): _ANYWHERE,
    ("static", False): f"{_ANYWHERE} The cache has `max_sequence_length` columns from the first "
    f"call to the last, at least as many as the text will have; one buffer, bound as past and "
    f"present, is written in place. `attention_mask` is as long as the text so far.",
    ("shared", False): f"{_ANYWHERE} {_ONE_BUFFER}",
    ("shared", True): f"Rows are padded on the right, and the next token of a row takes the place "
    f"of its padding. {_ONE_BUFFER}",
}


def _adapters(report: Mapping[str, Any]) -> str:
    rows = [
        f"| `{adapter}` | {name} | {proof['max_abs_error']:.1e} | {proof['budget']:.1e} |"
        for name, variant in report["variants"].items()
        for adapter, proof in variant["adapters"].items()
    ]
    return (
        "The folder carries LoRA adapters that switch on the one base: `gptopt run THIS_FOLDER "
        "--adapter NAME`, in Python `EdgeModel.use_adapter`, elsewhere onnxruntime's LoraAdapter "
        "or onnxruntime-genai's Adapters with `onnx/NAME.onnx_adapter` (`NAME_fp16` for files in "
        "float16). Without one the base runs. With each on, every logit was compared with the "
        "PyTorch model that has the adapter on.\n\n"
        "| adapter | file | largest error | budget |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def _proof(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    rows = [
        f"| {each['case']} | {each['positions']} | {each['max_abs_error']:.1e} | "
        f"{each['budget']:.1e} |"
        for each in report["cases"]
    ]
    text = (
        f"Every logit of onnxruntime {versions['onnxruntime']} was compared with the PyTorch model "
        f"(torch {versions['torch']}) in float64. The budget is twice the error of the same model "
        f"in float32 PyTorch, or 2e-5 of the range of the logits, whichever is more.\n\n"
        f"| case | positions | largest error | budget |\n|---|---|---|---|\n" + "\n".join(rows)
    )
    if (greedy := report["greedy"]) is None:
        return text
    return (
        f"{text}\n\nGreedy decoding: {greedy['agreeing']} of {greedy['tokens']} tokens are those "
        f"of the float64 model on the same text ({greedy['distinct']} distinct{_ties(greedy)})."
    )


def _mix(name: str, found: Mapping[str, Any]) -> str:
    """How many matrices of a file have which format, and the picture of what else was possible."""
    counts: dict[str, int] = {}
    for form in found["formats"].values():
        text = f"{form['bits']} bits in blocks of {form['block']}"
        counts[text] = counts.get(text, 0) + 1
    told = ", ".join(f"{count} in {text}" for text, count in sorted(counts.items()))
    return (
        f"The matrices of `{name}` were given formats for {found['budget']}: {told}.\n\n"
        f"![bytes and divergence of {name}](front_{name}.svg)"
    )


def _quality(measured: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(measured.values()))
    told = (
        f"On text that no file was calibrated on, {first['positions']} positions, beside the "
        f"PyTorch model in float32: perplexity and what part it is above the model's, divergence "
        f"from the model in nats, share of positions with the same likeliest token. In parentheses "
        f"what was allowed."
    )
    columns = ("file", "perplexity", "KL divergence", "largest", "same token")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, each in measured.items():
        limits = {
            key: "" if limit is None else f" ({limit:g})" for key, limit in each["allowed"].items()
        }
        perplexity = "-"
        if each["perplexity"] is not None:
            perplexity = f"{each['perplexity']:.5g}, {each['increase']:+.4f}{limits['perplexity']}"
        rows.append(
            f"| `{name}` | {perplexity} | {each['mean_kl']:.1e}{limits['mean_kl']} | "
            f"{each['max_kl']:.1e} | {each['agreement']:.3f}{limits['agreement']} |"
        )
    return told + "\n\n" + "\n".join(rows)


def _ties(greedy: Mapping[str, Any]) -> str:
    return f", {greedy['near_ties']} near ties" if greedy["near_ties"] else ""
