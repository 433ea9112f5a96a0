"""What `gptopt bench inference` measures where no folder is given, made on the spot.

A model of GPT-2's shape with random weights, and the folders that the export makes of it. Speed
does not depend on the weights, agreement does: GPT-2's own initialisation ties every token to
itself and repeats one for ever, so here the blocks weigh more than the embedding.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

from gptopt.manifest import staged_folder
from gptopt.precisions import BlockFormat, Format, Precision, find_precisions

logger = logging.getLogger(__name__)

_EMBEDDING, _BLOCKS = 0.02, 0.06  # standard deviations
_CALIBRATION = 4096  # tokens, as random as the weights

# folder -> (target, precisions, int8 cache)
PRESETS: dict[str, tuple[str, str, bool]] = {
    "ort-cpu-kv8": ("ort-cpu", "q4,q4-fast,q8,fp32", True),
    "ort-cpu": ("ort-cpu", "fp32,q8", False),
    "portable": ("portable", "q4", False),
}


def make_gpt2(folder: Path, **shape: int) -> None:
    """Write a Hugging Face folder of a random GPT-2 (124M by default) with a tokenizer of its size.

    Args:
        folder: to write; left alone where it exists.
        shape: of GPT2Config, where it differs.
    """
    if folder.exists():
        return
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**shape)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=_EMBEDDING)  # zero biases would hide a lost one
            elif ".h." in name and parameter.dim() == 2:
                parameter.normal_(std=_BLOCKS)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        write_tokenizer(staging, config.vocab_size)


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of exactly `size` ids: bytes, then pairs of bytes, then the end.

    Converters insist on one; nothing that is measured uses it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in letters for b in letters][: size - 1 - len(letters)]
    words = [*letters, *(a + b for a, b in merges)]
    vocab = {word: id_ for id_, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end,
            "unk_token": end, "model_max_length": 1024}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({**vocab, end: len(vocab)}), encoding="utf-8")
    pairs = "\n".join(f"{a} {b}" for a, b in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n", encoding="utf-8")


def make_edges(source: Path, work: Path) -> list[Path]:
    """The folders of PRESETS in `work`, exported from a model folder where they are not there yet.

    Every file is proven, as every export is. What rounding costs is not measured, for of random
    weights that says nothing; nor are 4-bit codes found by GPTQ, which takes minutes and changes
    no size and no speed.
    """
    missing = [name for name in PRESETS if not (work / name).exists()]
    if missing:
        import numpy as np

        from gptopt.checkpoint import load_model
        from gptopt.export.calibration import Calibration
        from gptopt.export.package import Common, Plan, export_model
        from gptopt.export.targets import TARGETS

        loaded = load_model(str(source), kernels="reference")
        vocab_size = loaded.model.config.vocab_size
        assert vocab_size is not None
        ids = np.random.default_rng(0).integers(0, vocab_size, _CALIBRATION).tolist()
        calibration, common = Calibration(loaded.model, ids), Common()
        for name in missing:
            target, precisions, int8_cache = PRESETS[name]
            logger.info("exporting %s", work / name)
            chosen = [_searched(each) for each in find_precisions(precisions)]
            plan = Plan(chosen, calibration, int8_cache=int8_cache)
            export_model(
                loaded.model, loaded.tokenizer, work / name, target=TARGETS[target], plan=plan,
                common=common,
            )  # fmt: skip
    return [work / name for name in PRESETS]


def _searched(precision: Precision) -> Precision:
    """The same formats, their codes found by a search over scales."""

    def of(form: Format | None) -> Format | None:
        return replace(form, method="search") if isinstance(form, BlockFormat) else form

    head = precision.head and replace(precision.head, method="search")
    overrides = {name: of(form) for name, form in precision.overrides.items()}
    return replace(precision, layers=of(precision.layers), head=head, overrides=overrides)
