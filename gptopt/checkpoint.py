"""Model folders: written as Hugging Face expects them, and read whoever wrote them.

Only JSON and safetensors are ever read; nothing in a folder can run code.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptopt import hf, hub
from gptopt.card import CARD, model_card
from gptopt.config import ModelConfig
from gptopt.errors import UserError, first_line
from gptopt.lora import Adapter, is_adapter, load_adapter, put_on, save_adapter
from gptopt.manifest import read_json, write_json, write_text
from gptopt.model import GPT, model_of
from gptopt.model.block import Impl
from gptopt.tensors import write_tensors

if TYPE_CHECKING:
    from gptopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d+)")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHOWN = 10  # names listed in an error


class LoadedModel(NamedTuple):
    """A model read from a folder, in evaluation mode."""

    model: GPT
    tokenizer: "Tokenizer | None"
    folder: Path


def save_model(
    folder: Path,
    model: GPT,
    tokenizer: "Tokenizer | None",
    *,
    card: str | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder; the caller stages it (`gptopt.manifest.staged_folder`).

    Where transformers knows the architecture, config.json and the weights have its names, and
    `AutoModelForCausalLM.from_pretrained` loads the folder. Of a model with an adapter (LoRA) only
    the adapter is written, as PEFT would, beside the tokenizer: its base has a folder already.

    Args:
        folder: an existing folder.
        model: its weights are written in the precision they have.
        tokenizer: saved beside it where there is one.
        card: Markdown that follows the facts of the model in README.md.
        state: whole weights to write instead of the model's own, which may be changing meanwhile
            or spread over ranks.

    Raises:
        ValueError: the model holds weights that a plain GPT does not have.
        OSError: the disk is full, or the folder is not writable.
    """
    if model.lora is not None:
        save_adapter(folder, model, state=state)
        if tokenizer is not None:  # for its template: the base may be spoken to in another one
            tokenizer.save(folder)
        write_text(folder / CARD, model_card(model, tokenizer, card))
        return
    config = model.config
    architecture = hf.architecture_of(config)
    state = model.state_dict() if state is None else state
    _check_plain(config, state)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tensors: dict[str, Tensor] = {}
    for weight in hf.weights(config, architecture, shapes):
        for name, part in weight.split([state[own].detach() for own in weight.owns]).items():
            tensors[hf.stored_name(architecture, name)] = part
    write_tensors(folder / WEIGHTS, tensors)

    names = ("bos", "eos", "pad")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in names}
    values = hf.config_to_json(
        config,
        token_ids=ids,
        tokenizer_size=None if tokenizer is None else tokenizer.size,
        dtype=str(next(iter(state.values())).dtype).removeprefix("torch."),
    )
    write_json(folder / CONFIG, values)
    write_json(folder / GENERATION_CONFIG, {k: v for k, v in ids.items() if v is not None})
    write_text(folder / CARD, model_card(model, tokenizer, card))
    if tokenizer is not None:
        tokenizer.save(folder)


def _check_plain(config: ModelConfig, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        plain = model_of(config).state_dict().keys()
    if state.keys() != plain:
        raise ValueError(
            f"the model's weights are not those of a plain GPT: "
            f"{_listed(set(state) ^ set(plain))}; unwrap it, or merge what was added to its layers"
        )


def load_model(
    ref: str | Path,
    *,
    checkpoint: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernels: Impl = "auto",
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Open a model folder, a run folder, a Hugging Face folder or hf:org/name[@revision].

    An adapter folder (LoRA) stands for its base with the adapter on it, as it does for PEFT.

    Args:
        ref: which model.
        checkpoint: of a run folder: auto, best, last or a step number.
        device: where the weights go.
        dtype: their precision (None: float32, whatever the file holds).
        kernels: which operator bodies run; never read from the folder.
        adapter: folder or run of an adapter to put on the model.

    Raises:
        UserError: no such model, a malformed file, weights that do not fit the configuration, or an
            adapter of another model.
    """
    folder = resolve_model(ref, checkpoint)
    if adapter is not None or is_adapter(folder):
        found, base = _adapter_and_base(ref, folder, adapter)
        loaded = load_model(base, kernels=kernels)
        model = put_on(loaded.model, found).to(device=device, dtype=dtype or torch.float32)
        return loaded._replace(model=model, tokenizer=_tokenizer_with(found, loaded))
    config, architecture = hf.config_from_json(_read_json(folder / CONFIG), folder / CONFIG)
    with _open_weights(folder) as stored:
        if config.n_layer > len(stored):  # before a mistyped number of blocks is built
            raise UserError(
                f"{folder / CONFIG}: {config.n_layer} layers do not fit the {len(stored)} tensors "
                f"of the weights; restore the file"
            )
        with torch.device("meta"):
            model = model_of(config, kernels=kernels)
        state = _read_state(folder, model, architecture, stored, device, dtype or torch.float32)
    _warn_of_nan(folder, state)
    model.load_state_dict(state, assign=True)
    return LoadedModel(model.eval(), _load_tokenizer(folder, config), folder)


def _adapter_and_base(
    ref: str | Path, folder: Path, adapter: str | Path | None
) -> tuple[Adapter, Path]:
    """The adapter that is meant, and the folder of its base."""
    if adapter is not None:
        if is_adapter(folder):
            raise UserError(
                f"{ref}: is an adapter itself; give its base beside --adapter {adapter}"
            )
        place = resolve_model(adapter)
        if not is_adapter(place):
            raise UserError(f"--adapter {adapter}: holds a whole model, no adapter")
        return load_adapter(place), folder
    found = load_adapter(folder)
    base = Path(found.base.name)
    if not found.base.name or not base.is_dir() or is_adapter(base):
        raise UserError(
            f"{folder}: its base {found.base.name!r} is not a model folder here; give the base as "
            f"the model and this folder as --adapter"
        )
    return found, resolve_model(base)


def resolve_model(ref: str | Path, checkpoint: str = "auto") -> Path:
    """The model folder that a reference stands for.

    Raises:
        UserError: there is none, or the run has no such checkpoint.
    """
    if str(ref).startswith(hub.PREFIX):
        if checkpoint != "auto":
            raise UserError(f"{ref}: is no run folder, so it has no checkpoint {checkpoint!r}")
        return hub.download(str(ref))
    folder = Path(ref)
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}; expected a model folder, a run folder or hf:org/name")
    if (folder / CHECKPOINTS).is_dir():
        return _checkpoint_of(folder, checkpoint)
    if checkpoint != "auto":
        raise UserError(f"{folder}: is no run folder, so it has no checkpoint {checkpoint!r}")
    if not (folder / CONFIG).is_file() and not is_adapter(folder):
        raise UserError(f"{folder}: holds neither {CONFIG} nor {CHECKPOINTS}/; is it a model?")
    return folder


def _checkpoint_of(run: Path, checkpoint: str) -> Path:
    """The folder of one checkpoint: run/best and run/latest hold the names of two of them."""
    steps = {
        int(match[1]): path
        for path in (run / CHECKPOINTS).iterdir()
        if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    }
    if not steps:
        raise UserError(f"{run}: the run has no checkpoint yet; train it further")
    if checkpoint.isdecimal():
        if int(checkpoint) in steps:
            return steps[int(checkpoint)]
        found = ", ".join(str(step) for step in sorted(steps)[-_SHOWN:])
        raise UserError(f"{run}: no checkpoint of step {checkpoint}; there are {found}")
    if checkpoint not in ("auto", "best", "last"):
        raise UserError(f"--checkpoint {checkpoint}: expected auto, best, last or a step number")
    if checkpoint == "best" and not (run / "best").is_file():
        raise UserError(f"{run}: the run was never evaluated, so it has no best checkpoint")
    for pointer in ("latest",) if checkpoint == "last" else ("best", "latest"):
        if (run / pointer).is_file():
            name = (run / pointer).read_text(encoding="utf-8").strip()
            match = _STEP.fullmatch(name)
            if match is None or int(match[1]) not in steps:
                raise UserError(
                    f"{run / pointer}: names {name!r}, which is not in {CHECKPOINTS}/; "
                    f"choose another one with --checkpoint"
                )
            return steps[int(match[1])]
    return steps[max(steps)]  # killed after the first checkpoint, before it was noted


@contextmanager
def _open_weights(folder: Path) -> Iterator[dict[str, Any]]:
    """Names of the stored tensors -> the open safetensors file that holds each."""
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                names = list(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{path}: not readable as safetensors ({first_line(error)}); "
                    f"the file is truncated or foreign, copy it again"
                ) from None
            stored.update(dict.fromkeys(names, file))
        yield stored


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or the shards of an index; links are followed."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = (
            f"{others[0].name} is pickled and is never read, convert it to safetensors"
            if others
            else "an exported folder holds none; give the model that it was made from"
        )
        raise UserError(f"{folder}: has no {WEIGHTS}; {hint}")
    table = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{folder / INDEX}: has no weight_map; copy the file again")
    files = set()
    for name in table.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{folder / INDEX}: {name!r} is not a plain name of a shard")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: listed in {INDEX} but missing; copy it again")
        files.add(name)
    return [folder / name for name in sorted(files)]


def _read_state(
    folder: Path,
    model: GPT,
    architecture: str,
    stored: dict[str, Any],
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Our weights from the stored tensors, after their names and shapes were compared."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plan = hf.weights(model.config, architecture, shapes)
    names = hf.plain_names(architecture, stored)
    tied_copy = names.pop(hf.HEAD, None) if model.head is None else None
    wanted = {
        name: shape
        for weight in plan
        for name, shape in zip(weight.parts, weight.shapes(shapes[weight.owns[0]]), strict=True)
    }
    _compare_names(folder, set(wanted), set(names))
    _compare_shapes(folder, wanted, {name: stored[names[name]] for name in wanted}, names)

    def read(name: str) -> Tensor:
        tensor: Tensor = stored[name].get_tensor(name)
        # A copy, so that the model does not change with the file it was read from.
        return tensor.to(device=device, dtype=dtype, copy=True)

    state: dict[str, Tensor] = {}
    for weight in plan:
        state |= weight.join([read(names[name]) for name in weight.parts])
    if tied_copy is not None and not torch.equal(read(tied_copy), state["wte.weight"]):
        raise UserError(
            f"{folder}: the configuration ties the head to the embedding, but {tied_copy} differs "
            f"from it; set tie_word_embeddings to false in {CONFIG}"
        )
    return state


def _compare_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    parts = []
    if wanted - found:
        parts.append(f"the weights lack {_listed(wanted - found)}, which {CONFIG} asks for")
    if found - wanted:
        parts.append(f"the weights hold {_listed(found - wanted)}, which {CONFIG} has no place for")
    if parts:
        raise UserError(f"{folder}: {'; '.join(parts)}; these two files do not belong together")


def _compare_shapes(
    folder: Path, wanted: dict[str, tuple[int, ...]], files: dict[str, Any], names: dict[str, str]
) -> None:
    wrong = []
    for name, shape in wanted.items():
        part = files[name].get_slice(names[name])
        found = tuple(part.get_shape())
        if found != shape:
            wrong.append(f"{name} is {found} in the weights and {shape} by {CONFIG}")
        elif part.get_dtype() not in _FLOATS:
            wrong.append(f"{name} is of dtype {part.get_dtype()}, expected a float of 16-64 bits")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{folder}: {'; '.join(wrong[:_SHOWN])}{more}")


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(shown)}{more}"


def _warn_of_nan(folder: Path, state: dict[str, Tensor]) -> None:
    bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in state.items()}
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        logger.warning(
            "%s: %d weights are NaN or infinite, in %d tensors (%s): so will its output be",
            folder, sum(bad.values()), len(bad), _listed(set(bad)),
        )  # fmt: skip


def _load_tokenizer(folder: Path, config: ModelConfig) -> "Tokenizer | None":
    old = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not old and not (folder / "tokenizer.json").is_file():
        return None
    from gptopt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    size = config.vocab_size or 0
    if tokenizer.size > size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} ids, but the model's vocabulary has "
            f"{size}; restore the tokenizer that the model was trained with"
        )
    return tokenizer


def _tokenizer_with(adapter: Adapter, base: LoadedModel) -> "Tokenizer | None":
    """The base's, with the chat template that the adapter was taught with where it tells one."""
    if base.tokenizer is None or not (adapter.folder / "tokenizer.json").is_file():
        return base.tokenizer
    own = type(base.tokenizer).load(adapter.folder)
    if own.sha256 == base.tokenizer.sha256:
        return own
    logger.warning("%s: its tokenizer is not its base's, which is used", adapter.folder)
    return base.tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    return read_json(path)
