"""llama.cpp by llama-cpp-python's C interface. Variants: f32, f16, q8_0, q4_0, q4_k_m."""

import ctypes
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
          "q4_k_m": "MOSTLY_Q4_K_M"}  # fmt: skip
_CONTEXT = 1024


class Peer:
    """See the package. Flash attention stays as llama.cpp chooses it; the cache is float16."""

    def __init__(self, model: Path, variant: str, threads: int) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        path = model / "model.gguf"
        self.lib.llama_backend_init()
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(vocab)
        self.threads = threads
        self.context: Any = None
        self.rows = 0
        self.version = f"llama-cpp-python {self.lib.__version__}"
        self.disk_bytes = path.stat().st_size
        self.cache_bytes = 2

    def generate(self, ids: Any, new: int) -> tuple[Any, list[float]]:
        """See the package."""
        B, T = ids.shape
        self._clear(B)
        stamps = [time.perf_counter()]
        token = np.array([self._prompt(row, text) for row, text in enumerate(ids)])
        made = [token]
        stamps.append(time.perf_counter())
        for place in range(T, T + new - 1):
            entries = [(int(id_), place, row, True) for row, id_ in enumerate(token)]
            token = np.array(self._decode(entries))
            made.append(token)
            stamps.append(time.perf_counter())
        return np.stack(made, axis=1), stamps

    def _clear(self, rows: int) -> None:
        if self.rows != rows:
            if self.context:
                self.lib.llama_free(self.context)
            parameters = self.lib.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max = _CONTEXT * rows, rows
            parameters.n_batch, parameters.n_ubatch = 2048, 512
            parameters.n_threads = parameters.n_threads_batch = self.threads
            self.context = self.lib.llama_init_from_model(self.model, parameters)
            if not self.context:
                raise ValueError("llama.cpp cannot make a context")
            self.rows = rows
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def _prompt(self, row: int, text: Any) -> int:
        last = len(text) - 1
        return self._decode([(int(id_), i, row, i == last) for i, id_ in enumerate(text)])[0]

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """(id, position, sequence, wanted) each; the likeliest token of each one wanted."""
        batch = self.lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (id_, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = id_, position
            batch.n_seq_id[i], batch.logits[i] = 1, wanted
            batch.seq_id[i][0] = row
        code = self.lib.llama_decode(self.context, batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        found = []
        for i, entry in enumerate(entries):
            if entry[3]:
                scores = self.lib.llama_get_logits_ith(self.context, i)
                found.append(int(np.ctypeslib.as_array(scores, shape=(self.vocab_size,)).argmax()))
        self.lib.llama_batch_free(batch)
        return found


def prepare(source: Path, out: Path, variant: str) -> None:
    """Write model.gguf: float32 by the gguf package, anything else by llama.cpp's quantiser."""
    plain = out.with_name("llamacpp-f32") / "model.gguf"
    if not plain.is_file():
        plain.parent.mkdir(parents=True, exist_ok=True)
        staged = plain.with_suffix(".part")
        _write(source, staged)
        staged.replace(plain)
    if variant == "f32":
        return
    lib: Any = importlib.import_module("llama_cpp")
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = getattr(lib, f"LLAMA_FTYPE_{_TYPES[variant]}")
    parameters.nthread = 2
    out.mkdir(parents=True, exist_ok=True)
    target = str(out / "model.gguf").encode()
    if lib.llama_model_quantize(str(plain).encode(), target, ctypes.byref(parameters)):
        raise ValueError(f"llama.cpp cannot quantise to {variant}")


def _write(source: Path, path: Path) -> None:
    gguf: Any = importlib.import_module("gguf")
    load_file: Any = importlib.import_module("safetensors.numpy").load_file
    weights = {
        name.removeprefix("transformer."): array
        for name, array in load_file(source / "model.safetensors").items()
    }
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<|{n}|>" for n in range(len(tokens), config["vocab_size"])]
    end = len(tokens) - 1
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_name("gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL])
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    for name, array in _renamed(weights, config["n_layer"]):
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(weights: dict[str, Any], layers: int) -> list[tuple[str, Any]]:
    """llama.cpp's names; its matrices are (out, in), GPT-2's (in, out)."""
    named = [
        ("token_embd.weight", weights["wte.weight"]),
        ("position_embd.weight", weights["wpe.weight"]),
        ("output_norm.weight", weights["ln_f.weight"]),
        ("output_norm.bias", weights["ln_f.bias"]),
    ]
    norms = {"attn_norm": "ln_1", "ffn_norm": "ln_2"}
    products = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj"}  # fmt: skip
    for i in range(layers):
        for theirs, ours in {**norms, **products}.items():
            weight = weights[f"h.{i}.{ours}.weight"]
            named.append((f"blk.{i}.{theirs}.weight", weight.T if theirs in products else weight))
            named.append((f"blk.{i}.{theirs}.bias", weights[f"h.{i}.{ours}.bias"]))
    return named
