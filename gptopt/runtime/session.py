"""onnxruntime behind one small class: the provider that was asked for, the contract, the cache.

The only module that touches onnxruntime. It is imported when a model is loaded, so that the rest of
the runtime works, and explains itself, where it is not installed.
"""

import contextlib
import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.runtime.adapters import Matrices, Slots
from gptopt.runtime.folder import EdgeConfig
from gptopt.runtime.pages import let_go, use_huge_pages
from gptopt.runtime.settings import Settings
from gptopt.runtime.variants import EdgeFile

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
_CACHE_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
_NUMPY = {**_FLOAT_TYPES, "tensor(int8)": np.int8}
KEEP = "num_logits_to_keep"  # optional input: score the last so many positions; 0: all
_PLAIN = EdgeFile()
Prepared = dict[str, Any]  # optional input -> onnxruntime value
# onnxruntime's tiled attention is the faster one for float caches, the plain one for int8; the
# variable is read while a session is opened.
_NO_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
WEIGHTS = "session.model_external_initializers_file_folder_path"
_SETTLED = 16  # tokens after which moving the weights, some 50 ms, will be repaid
_ENTRIES = {
    "session.load_model_format": "ONNX",
    # Weights are packed for this processor while a session is opened, here by all threads.
    "session.prepack.enable_parallel": "1",
    # On a CPU the fused form is many times slower than the Add and the norm that it replaces.
    "optimization.disable_specified_optimizers": "SkipLayerNormFusion",
}


class Session:
    """A graph that keeps the contract of an exported folder.

    Attributes:
        provider: our name of the provider that runs. device: where the cache lies.
        past, present: names of the cache's inputs and outputs, key and value by layer.
        cache_dtype, logits_dtype: numpy types.
        cache_shape: (K, D).
        keeps: whether the graph scores only the last positions where KEEP asks it to.
        slots: low-rank inputs for adapters. adapter: the one that is on, as `prepare` made it.
        keep_none: what KEEP is told where no position needs a score.
        settings: how its threads work.
    """

    def __init__(
        self,
        path: Path,
        config: EdgeConfig,
        provider: str,
        threads: int = 0,
        *,
        file: EdgeFile = _PLAIN,
        settings: Settings | None = None,
        weights: Path | None = None,
    ) -> None:
        """Load `path`, which must have been checked before.

        Args:
            path: the ONNX file.
            config: sizes that its inputs and outputs must have.
            provider: our name of an execution provider.
            threads: used where no settings are given.
            file: what is known of the file.
            settings: how the threads work.
            weights: the folder of the graph's data, where that is not the graph's own.

        Raises:
            UserError: onnxruntime or the provider is not available.
            CheckFailed: onnxruntime refuses the graph, or it breaks the contract.
        """
        ort = _onnxruntime()
        self._path = path
        self.provider = provider.lower()
        self.settings = settings or Settings(threads)
        name, self.device = _provider(ort, self.provider)
        self._session = _open(ort, path, name, self.settings, file, weights)
        let_go(path.with_name(path.name + "_data"))
        self.past, self.present = _cache_names(config)
        self.logits_dtype, self.cache_dtype = _check_contract(self._session, path, config, file)
        self.cache_shape = (config["kv_heads"], config["head_size"])
        self.vocab_size = config["vocab_size"]
        self.file = file
        extra = {item.name: item for item in self._session.get_overridable_initializers()}
        self.keeps = KEEP in extra
        self._keep_shape = [1] if self.keeps and extra[KEEP].shape else []
        self.slots = Slots(extra)
        self.adapter: Prepared | None = None
        # Elsewhere than on a CPU, kernels may not take what is empty.
        self.keep_none = -(2**31) if self.provider == "cpu" else 1
        self._steps = 0

    def run(
        self, ids: Ints, mask: Bools, position_ids: Ints, past: Sequence[Any], keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], list[Any]]:
        """Scores (B, T, V) float32 and the cache after ids (B, T), as onnxruntime values.

        The mask (B, P + T) is False where padding lies.
        `past` is a cache this method returned, or arrays (B, K, P, D), key and value by layer; an
        empty one stands for P = 0. Where the graph can, only the last `keep` positions are scored.
        """
        logits, *present = self._bound(ids, mask, position_ids, past, keep)
        return logits.numpy().astype(np.float32, copy=False), present

    def _bound(
        self, ids: Ints, mask: Bools, position_ids: Ints, past: Sequence[Any], keep: int
    ) -> list[Any]:
        # Bound, not passed: on a GPU the cache then never leaves the device between two steps.
        binding = self.new_binding()
        K, D = self.cache_shape
        past = past or [np.zeros((len(ids), K, 0, D), self.cache_dtype)] * len(self.past)
        if self.file.cache == "static":
            past = [_with_room(part, ids.shape[1]) for part in past]
        feeds = dict(zip((*_IDS, *self.past), (ids, mask, position_ids, *past), strict=True))
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                dtype = np.int64 if name in _IDS else self.cache_dtype
                feeds[name] = np.ascontiguousarray(value, dtype)  # held until the run is over
                binding.bind_cpu_input(name, feeds[name])
            else:
                binding.bind_ortvalue_input(name, value)
        if keep and self.keeps:
            binding.bind_ortvalue_input(KEEP, self.kept(keep))
        binding.bind_output("logits", "cpu")
        for name in self.present:
            binding.bind_output(name, self.device)
        self.execute(binding)
        values: list[Any] = binding.get_outputs()
        return values

    def kept(self, count: int) -> Any:
        """The value of the input KEEP, in the shape that the graph declares.

        An optional input can be bound as a value only, not as an address.
        """
        array = np.array(count, dtype=np.int64).reshape(self._keep_shape)
        return _onnxruntime().OrtValue.ortvalue_from_numpy(array)

    def prepare(self, matrices: Matrices) -> Prepared:
        """An adapter ready to be switched on, by `adapter`; bindings keep the one they began with.

        Raises:
            CheckFailed: it does not fit the graph.
        """
        self.slots.check(matrices, self._path)
        make = _onnxruntime().OrtValue.ortvalue_from_numpy
        return {name: make(value) for name, value in self.slots.filled(matrices).items()}

    def new_binding(self) -> Any:
        """An onnxruntime IOBinding of this session, with the adapter that is on."""
        binding = self._session.io_binding()
        for name, value in (self.adapter or {}).items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def execute(self, binding: Any) -> None:
        """Run what is bound; CheckFailed where the graph cannot."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise CheckFailed(
                f"{self._path}: onnxruntime cannot run the graph ({first_line(error)[:600]}); "
                f"export the model again"
            ) from None

    def count_step(self) -> None:
        """Told of every token: when a text grows long, weights that lie well pay."""
        self._steps += 1
        if self._steps == _SETTLED and self.provider == "cpu":
            use_huge_pages()

    def zeros(self, shape: tuple[int, ...]) -> tuple[Any, int]:
        """A zeroed buffer of the cache's type on the session's device, and its address.

        On the CPU it is an array, else an onnxruntime value.
        """
        array = _untouched(shape, self.cache_dtype)
        if self.device == "cpu":
            return array, array.ctypes.data
        value = _onnxruntime().OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return value, value.data_ptr()


def _with_room(part: Any, tokens: int) -> npt.NDArray[Any]:
    """Keys or values (B, K, P, D) with room for so many more tokens behind them."""
    array = part if isinstance(part, np.ndarray) else part.numpy()
    return np.pad(array, ((0, 0), (0, 0), (0, tokens), (0, 0)))


def _untouched(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """A zeroed array whose pages the system hands out when they are first written.

    np.zeros would do, but numpy asks for huge pages, and then the first tokens of a text take all
    the memory that its longest form would.
    """
    count = math.prod(shape)
    size = max(count * np.dtype(dtype).itemsize, 1)
    try:
        if sys.platform == "win32":
            pages = mmap.mmap(-1, size)
        else:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise UserError(
            f"the cache takes up to {size / 2**30:.1f} GiB, which this machine refuses; read fewer "
            f"rows at once"
        ) from None
    return np.frombuffer(pages, dtype, count=count).reshape(shape)


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


def _open(
    ort: Any, path: Path, provider: str, settings: Settings, file: EdgeFile, weights: Path | None
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = 4  # its errors are raised: to print them as well says them twice
    for key, value in (settings.entries() | _ENTRIES).items():
        options.add_session_config_entry(key, value)
    if weights is not None:
        options.add_session_config_entry(WEIGHTS, str(weights.absolute()))
    try:
        # Without its fallback, which would try the CPU and print to stdout.
        with _environment(_NO_TILES, "1" if file.cache_dtype == "int8" else None):
            session = ort.InferenceSession(
                str(path), options, providers=[provider], enable_fallback=0
            )
    except Exception as error:
        remedy = "" if provider == PROVIDERS["cpu"][0] else ", or run it with --provider cpu"
        raise CheckFailed(
            f"{path}: onnxruntime refuses it ({first_line(error)[:600]}); export the model "
            f"again{remedy}"
        ) from None
    if provider not in session.get_providers():
        # For want of a driver, say, onnxruntime takes the CPU and merely warns.
        raise UserError(
            f"--provider: {provider} was asked for, onnxruntime runs {session.get_providers()}; "
            f"install what the provider needs, or ask for cpu"
        )
    return session


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for a moment, unless it is set already or there is no value."""
    if value is None or name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _cache_names(config: EdgeConfig) -> tuple[list[str], list[str]]:
    layers = range(config["n_layer"]) if config["causal"] else ()
    past, present = (
        [f"{name}.{i}.{part}" for i in layers for part in ("key", "value")]
        for name in ("past_key_values", "present")
    )
    return past, present


def _check_contract(session: Any, path: Path, config: EdgeConfig, file: EdgeFile) -> Any:
    """Compare inputs and outputs with config.json; numpy dtypes of the logits and the cache."""
    past, present = _cache_names(config)
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    _same_names(path, "inputs", list(inputs), [*_IDS, *past])
    chosen = ["next_tokens"] if file.tokens != "none" else []
    _same_names(path, "outputs", list(outputs), ["logits", *present, *chosen])
    for name in _IDS:
        _same_shape(path, inputs[name], ["tensor(int64)"], (None, None))
    logits = outputs["logits"]
    scored = 1 if file.scores == "last" and logits.shape[1] == 1 else None
    shape: tuple[int | None, ...] = (None, scored, config["vocab_size"])
    if config["labels"] is not None:
        shape = (None, len(config["labels"]))
    _same_shape(path, logits, list(_FLOAT_TYPES), shape)
    cached = _CACHE_TYPES[file.cache_dtype] if file.cache_dtype else logits.type
    cache = (None, config["kv_heads"], None, config["head_size"])
    for name in past:
        _same_shape(path, inputs[name], [cached], cache)
    for name in present:
        _same_shape(path, outputs[name], [cached], cache)
    return _FLOAT_TYPES[logits.type], _NUMPY[cached]


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
