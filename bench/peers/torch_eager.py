"""PyTorch without gptopt: transformers' GPT-2. Variants: float32, bfloat16; generate-float32 ..."""

import time
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """See the package. The plain variants run the forward pass in a loop, the others generate()."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.whole, _, kind = variant.rpartition("-")
        self.module = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, kind), attn_implementation="sdpa"
        ).eval()
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.disk_bytes = (model / "model.safetensors").stat().st_size
        self.cache_bytes = {"float32": 4, "bfloat16": 2}[kind]

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        import torch

        text = torch.from_numpy(ids)
        with torch.inference_mode():
            return self._generated(text, new) if self.whole else self._looped(text, new)

    def _looped(self, text: Any, new: int) -> tuple[Any, list[float]]:
        stamps, made, past = [time.perf_counter()], [], None
        for _ in range(new):
            out = self.module(
                input_ids=text, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            past = out.past_key_values
            text = out.logits[:, -1].argmax(-1, keepdim=True)
            made.append(text.numpy())
            stamps.append(time.perf_counter())
        return np.concatenate(made, axis=1), stamps

    def _generated(self, text: Any, new: int) -> tuple[Any, list[float]]:
        stamps = [time.perf_counter()]

        class Clock:
            """A streamer: told of the prompt first, then of every token."""

            def put(self, value: Any) -> None:
                if value.shape != text.shape:
                    stamps.append(time.perf_counter())

            def end(self) -> None:
                pass

        from transformers import LogitsProcessor

        class Watch(LogitsProcessor):  # type: ignore[misc]  # untyped base
            """The same for a batch, which streamers refuse: called once a step, before the last."""

            def __call__(self, seen: Any, scores: Any) -> Any:
                stamps.append(time.perf_counter())
                return scores

        alone = len(text) == 1
        out = self.module.generate(
            text, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            streamer=Clock() if alone else None, logits_processor=None if alone else [Watch()],
        )  # fmt: skip
        return out[:, text.shape[1] :].numpy(), stamps
