"""onnxruntime behind one small class: the provider that was asked for, the contract, the cache.

The only module that touches onnxruntime. It is imported when a model is loaded, so that the rest of
the runtime works, and explains itself, where it is not installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.runtime.folder import EdgeConfig

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Our name -> onnxruntime's name, and the device where the cache stays between steps.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "cpu"),
    "cuda": ("CUDAExecutionProvider", "cuda"),
    "coreml": ("CoreMLExecutionProvider", "cpu"),
    "dml": ("DmlExecutionProvider", "dml"),
    "openvino": ("OpenVINOExecutionProvider", "cpu"),
    "webgpu": ("WebGpuExecutionProvider", "cpu"),
}
_IDS = ("input_ids", "attention_mask", "position_ids")
_FLOAT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """A graph that keeps the contract of an exported folder.

    Attributes:
        provider: our name of the provider that runs.
    """

    def __init__(self, path: Path, config: EdgeConfig, provider: str, threads: int) -> None:
        """Load `path`, which must have been checked before.

        Raises:
            UserError: onnxruntime or the provider is not available.
            CheckFailed: onnxruntime refuses the graph, or it breaks the contract.
        """
        ort = _onnxruntime()
        self.provider = provider.lower()
        chosen, self._device = _provider(ort, self.provider)
        self._session = _open(ort, path, chosen, threads)
        self._past, self._present = _cache_names(config)
        self._dtype = _check_contract(self._session, path, config)
        self._shape = (config["kv_heads"], config["head_size"])

    def run(
        self, ids: Ints, mask: Bools, position_ids: Ints, past: Sequence[Any]
    ) -> tuple[npt.NDArray[np.float32], list[Any]]:
        """Scores (B, T, V) float32 and the cache after ids (B, T), as onnxruntime values.

        The mask (B, P + T) is False where padding lies.
        `past` is a cache this method returned, or arrays (B, K, P, D), key and value by layer; an
        empty one stands for P = 0.
        """
        logits, *present = self._bound(ids, mask, position_ids, past)
        return logits.numpy().astype(np.float32, copy=False), present

    def _bound(self, ids: Ints, mask: Bools, position_ids: Ints, past: Sequence[Any]) -> list[Any]:
        # Bound, not passed: on a GPU the cache then never leaves the device between two steps.
        binding = self._session.io_binding()
        K, D = self._shape
        past = past or [np.zeros((len(ids), K, 0, D), self._dtype)] * len(self._past)
        feeds = dict(zip((*_IDS, *self._past), (ids, mask, position_ids, *past), strict=True))
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                dtype = np.int64 if name in _IDS else self._dtype
                feeds[name] = np.ascontiguousarray(value, dtype)  # held until the run is over
                binding.bind_cpu_input(name, feeds[name])
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self._present:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise CheckFailed(f"onnxruntime cannot run the graph ({first_line(error)})") from None
        values: list[Any] = binding.get_outputs()
        return values


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(
            "running an exported folder needs onnxruntime; pip install 'gptopt[edge]'"
        ) from None
    return onnxruntime


def _provider(ort: Any, name: str) -> tuple[str, str]:
    """onnxruntime's name of a provider, and its device; UserError where it is not available."""
    installed = ort.get_available_providers()
    known = {key: value for key, value in PROVIDERS.items() if value[0] in installed}
    if name in known:
        return known[name]
    reason = "is not in this onnxruntime" if name in PROVIDERS else "is unknown"
    hint = " (install gptopt[edge-gpu] in place of gptopt[edge])" if name == "cuda" else ""
    raise UserError(f"--provider {name}: {reason}{hint}; available here: {', '.join(known)}")


def _open(ort: Any, path: Path, provider: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin while they wait halve the speed where another process needs the core (seen
    # with GPT-2 on two cores), and one sequence is bound by memory, not by waiting.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        # Without its fallback, which would try the CPU and print to stdout.
        session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        remedy = "" if provider == PROVIDERS["cpu"][0] else ", or run it with --provider cpu"
        raise CheckFailed(
            f"{path}: onnxruntime refuses it ({first_line(error)}); export the model again{remedy}"
        ) from None
    if provider not in session.get_providers():
        # For want of a driver, say, onnxruntime takes the CPU and merely warns.
        raise UserError(
            f"--provider: {provider} was asked for, onnxruntime runs {session.get_providers()}; "
            f"install what the provider needs, or ask for cpu"
        )
    return session


def _cache_names(config: EdgeConfig) -> tuple[list[str], list[str]]:
    layers = range(config["n_layer"]) if config["causal"] else ()
    past, present = (
        [f"{name}.{i}.{part}" for i in layers for part in ("key", "value")]
        for name in ("past_key_values", "present")
    )
    return past, present


def _check_contract(session: Any, path: Path, config: EdgeConfig) -> Any:
    """Compare the graph's inputs and outputs with config.json; the cache's numpy dtype."""
    past, present = _cache_names(config)
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    _same_names(path, "inputs", list(inputs), [*_IDS, *past])
    _same_names(path, "outputs", list(outputs), ["logits", *present])
    for name in _IDS:
        _same_shape(path, inputs[name], ["tensor(int64)"], (None, None))
    cache = (None, config["kv_heads"], None, config["head_size"])
    types = [outputs["logits"].type] if past else list(_FLOAT_TYPES)
    for name in past:
        _same_shape(path, inputs[name], types, cache)
    for name in present:
        _same_shape(path, outputs[name], types, cache)
    logits = outputs["logits"]
    _same_shape(path, logits, list(_FLOAT_TYPES), (None, None, config["vocab_size"]))
    return _FLOAT_TYPES[logits.type]


def _same_names(path: Path, what: str, found: list[str], expected: list[str]) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise CheckFailed(f"{path}: {what} lack {_some(missing)}, which config.json implies")
    if extra := sorted(set(found) - set(expected)):
        raise CheckFailed(f"{path}: {what} hold {_some(extra)}, unknown to config.json")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same_shape(path: Path, item: Any, types: list[str], shape: tuple[int | None, ...]) -> None:
    """None stands for a named, free dimension."""
    dims = list(item.shape)
    fits = len(dims) == len(shape) and all(
        isinstance(dim, str) if want is None else dim == want
        for dim, want in zip(dims, shape, strict=True)
    )
    if not fits or item.type not in types:
        wanted = ["*" if want is None else want for want in shape]
        raise CheckFailed(
            f"{path}: {item.name} is {item.type} {dims}, config.json says {types[0]} {wanted}"
        )
