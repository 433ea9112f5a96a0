"""What llama.cpp's formats make of a model's weights: a model folder with the rounded ones.

Run in llama.cpp's own environment: SOURCE OUT VARIANT. The weights are rounded by llama.cpp and
turned back into floats by the gguf package, so that the error of the format is measured in the same
program as all others. llama.cpp also rounds what its products read, which is left out here.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

_BACK = {
    "token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight",
    "output_norm.weight": "ln_f.weight", "output_norm.bias": "ln_f.bias",
}  # fmt: skip
_LAYERS = {
    "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_PRODUCTS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def write(source: Path, out: Path, variant: str) -> dict[str, Any]:
    """Write the folder; tell its bytes, and how many weights have which type."""
    peer: Any = importlib.import_module("llamacpp")
    gguf: Any = importlib.import_module("gguf")
    quants: Any = importlib.import_module("gguf.quants")
    numpy_files: Any = importlib.import_module("safetensors.numpy")
    made = out.with_name(f"llamacpp-{variant}")
    peer.prepare(source, made, variant)
    weights: dict[str, Any] = {}
    types: dict[str, int] = {}
    size, prefix = 0, ""
    for name in numpy_files.load_file(source / "model.safetensors"):
        prefix = "transformer." if name.startswith("transformer.") else prefix
    for tensor in gguf.GGUFReader(made / "model.gguf").tensors:
        kind = tensor.tensor_type.name
        array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array = array.reshape([int(n) for n in tensor.shape][::-1])
        size += int(tensor.n_bytes)
        if array.ndim == 2:
            types[kind] = types.get(kind, 0) + int(array.size)
        name, transposed = _ours(tensor.name)
        weights[prefix + name] = np.ascontiguousarray(array.T if transposed else array)
    out.mkdir(parents=True, exist_ok=True)
    numpy_files.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        if path.name != "manifest.json":
            shutil.copy(path, out / path.name)
    return {"bytes": size, "types": types, "version": peer_version()}


def peer_version() -> str:
    """Of llama-cpp-python."""
    return str(importlib.import_module("llama_cpp").__version__)


def _ours(name: str) -> tuple[str, bool]:
    """GPT-2's name of a tensor, and whether it lies the other way round."""
    if name in _BACK:
        return _BACK[name], False
    _, layer, part, kind = name.split(".")
    return f"h.{layer}.{_LAYERS[part]}.{kind}", part in _PRODUCTS and kind == "weight"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    told = write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    sys.stdout.write(json.dumps(told) + "\n")
