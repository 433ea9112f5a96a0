"""The model that `gptopt bench inference` measures: GPT-2's shape, random, made on the spot.

Speed does not depend on the weights, agreement does: GPT-2's own initialisation ties every token to
itself and repeats one for ever, so here the blocks weigh more than the embedding.
"""

import json
from pathlib import Path

from gptopt.manifest import staged_folder

_EMBEDDING, _BLOCKS = 0.02, 0.06  # standard deviations


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
