"""README.md of a model folder."""

import math

from gptopt import hf
from gptopt.model import GPT


def model_card(model: GPT, architecture: str, extra: str | None) -> str:
    """README.md: what the model is, who can load it, and whatever the caller adds."""
    config = model.config
    shape = ", ".join(
        f"{name} {value}"
        for name, value in config.model_dump().items()
        if name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    )
    if architecture == hf.OWN:
        reasons = min((hf.obstacles(config, name) for name in hf.ARCHITECTURES), key=len)
        loading = (
            f"transformers has no architecture for it ({', '.join(reasons)}): it is loaded by "
            f"`gptopt.load_model` only. Its configuration is config.json, key `gptopt`."
        )
        front = "library_name: gptopt"
    else:
        loading = (
            f"It is a `{architecture}` model: `transformers.AutoModelForCausalLM.from_pretrained` "
            f"loads this folder, and so does `gptopt.load_model`."
        )
        front = "library_name: transformers"
    task = "text-generation" if config.causal else "fill-mask"
    parts = [
        f"---\n{front}\npipeline_tag: {task}\ntags:\n- gptopt\n---",
        f"# A GPT of {_rounded(model.num_parameters())} parameters",
        f"Made with gptopt: {shape}; {config.norm_position}-{config.norm}, {config.activation}, "
        f"{config.position} positions.",
        loading,
    ]
    return "\n\n".join([*parts, extra.strip()] if extra else parts) + "\n"


def _rounded(count: int) -> str:
    """A count with three digits and a unit: 124 M."""
    power = min(int(math.log10(max(count, 1))) // 3, 3)
    return f"{count / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"
