"""`gptopt merge`: an adapter and its base become one plain model folder."""

from pathlib import Path
from typing import Any

from gptopt.card import code, short
from gptopt.checkpoint import load_model, save_model
from gptopt.config_export import MergeOptions
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.lora.layers import lora_parameters, merge_lora
from gptopt.manifest import staged_folder


def merge(options: MergeOptions) -> dict[str, Any]:
    """Merge an adapter into its base and write the model folder.

    Returns:
        out (the folder), base (its folder), parameters, adapter_parameters and rank.

    Raises:
        UserError: there is no adapter, it belongs to another base, or the folder exists.
    """
    loaded = load_model(options.model, checkpoint=options.checkpoint, adapter=options.adapter)
    model, out = loaded.model, Path(options.out)
    if model.lora is None:
        raise UserError(
            f"{options.model}: is a plain model, there is nothing to merge; name an adapter with "
            f"--adapter"
        )
    result = {
        "out": str(out),
        "base": str(loaded.folder),
        "parameters": 0,
        "adapter_parameters": sum(parameter.numel() for parameter in lora_parameters(model)),
        "rank": model.lora.rank,
    }
    card = (
        f"Merged by `gptopt merge` from the base {code(short(str(loaded.folder)))} and an adapter "
        f"of rank {model.lora.rank}, {code(short(options.adapter or options.model))}; their cards "
        f"say how they were made."
    )
    merge_lora(model)
    result["parameters"] = model.num_parameters()
    with staged_folder(out, force=options.force) as folder:
        save_model(folder, model, loaded.tokenizer, card=card)
    if not options.json_output:
        say(
            f"{out}: {result['parameters']:,} parameters, {result['adapter_parameters']:,} of the "
            f"adapter merged into {loaded.folder}"
        )
    return result
