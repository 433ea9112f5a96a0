"""The command line: `gptopt VERB ...`.

Flags are made from the documented fields in gptopt.config. Values are merged as text, default <
preset < file < flag, and checked once by pydantic, so every mistake ends in one line that names the
flag or the file's key it came from. Exit codes: 0 done, 1 a check failed, 2 a user's mistake,
3 diverged, 130 interrupted, 143 terminated after saving.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import logging
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from gptopt import __version__, log
from gptopt.errors import UserError, first_line
from gptopt.verbs import VERBS, Verb

if typing.TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

logger = logging.getLogger(__name__)

Values = dict[str, Any]  # dotted option name -> value as given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    log.configure(quiet="--quiet" in arguments or not _speaks(), debug=debug)
    return in_one_line(lambda: _dispatch(arguments), debug=debug)


def in_one_line(program: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a program; what ends it early is one line on stderr.

    Args:
        program: returns its exit code, or None for 0.
        debug: let the error through, with its traceback.

    Returns:
        The exit code, see above.
    """
    try:
        return program() or 0
    except UserError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except RuntimeError as error:
        # The operators stand below gptopt.errors; theirs says all that a user needs, in one line.
        if debug or type(error).__name__ != "KernelUnavailable":
            raise
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        _complain("interrupted; nothing half-written was left")
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away (`gptopt ... | head`): not an error of ours.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 0


def _speaks() -> bool:
    """Whether this process speaks for those that torchrun started with it: the first one does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def _complain(message: str) -> None:
    line = " ".join(message.split())
    print(f"gptopt: error: {line}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"gptopt {__version__}")
        return 0
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    name = " ".join(arguments[:words])
    if name not in VERBS:
        raise UserError(f"{name!r} is not a verb{_hint(name, VERBS)}; see gptopt --help")
    verb = VERBS[name]
    options = parse(name, arguments[words:])
    with _named_extra(name, verb):
        module, _, attribute = verb.function.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        if not getattr(options, "json_output", False):
            function(options)
            return 0
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries the JSON object alone
            result = function(options)
    if _speaks():
        log.say(json.dumps(result, ensure_ascii=False))
    return 0


@contextlib.contextmanager
def _named_extra(name: str, verb: Verb) -> Iterator[None]:
    """Say which extra brings a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if verb.extra is None or (error.name or "gptopt").startswith("gptopt"):
            raise
        raise UserError(
            f"gptopt {name} needs the package {error.name}; pip install 'gptopt[{verb.extra}]'"
        ) from None


def _overview() -> str:
    lines = ["usage: gptopt VERB [options]", "", "A GPT from text to the edge.", ""]
    for name, verb in VERBS.items():
        lines.append(f"  {name:<16} {_first_sentence(verb.options_class)}")
    return "\n".join([*lines, "", "gptopt VERB --help lists a verb's options."])


def _first_sentence(options: type) -> str:
    return " ".join((options.__doc__ or "").split("\n\n")[0].split())


# --- options from flags, files and presets ------------------------------------------------------


def parse(name: str, arguments: Sequence[str]) -> "BaseModel":
    """The options of one verb from its command line.

    Raises:
        UserError: an unknown flag or key, a value out of range, or a file that cannot be read.
    """
    verb = VERBS[name]
    options = verb.options_class
    parser = _parser(name, verb, options)
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(
            f"gptopt {name}: {unknown[0]!r} is not an option{_hint(unknown[0], flags)}; "
            f"see gptopt {name} --help"
        )
    flags_given = vars(given)
    config_file = flags_given.pop("config", None)
    flags_given.pop("debug", None), flags_given.pop("quiet", None)
    layers = {"flag": flags_given, "file": _read_toml(config_file, options)}
    layers["preset"] = _preset({**layers["file"], **layers["flag"]}.get("preset"))
    values = {**layers["preset"], **layers["file"], **layers["flag"]}
    sources = {key: layer for layer in ("preset", "file", "flag") for key in layers[layer]}
    checked = _validate(name, options, values, sources, config_file)
    _announce(name, values, sources, verb)
    return checked


def _parser(name: str, verb: Verb, options: "type[BaseModel]") -> "_Parser":
    parser = _Parser(
        prog=f"gptopt {name}",
        description=_first_sentence(options),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="%(prog)s [options]",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, field in _leaves(options):
        group = key.rpartition(".")[0]
        if group and group not in groups:
            groups[group] = parser.add_argument_group(options.model_fields[group].description)
        if key == verb.positional:
            many = _is_list(field)
            parser.usage = f"%(prog)s {_metavar_of(key)}{' ...' if many else ''} [options]"
            # Optional for argparse, because a --config file may give it; pydantic sees to the rest.
            parser.add_argument(
                key,
                nargs="*" if many else "?",
                default=argparse.SUPPRESS,
                metavar=_metavar_of(key),
                help=field.description,
            )
        else:
            _add_flag(groups.get(group, parser), key, field)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    parser.add_argument("--debug", action="store_true", help="show a traceback on an error")
    return parser


def _metavar_of(positional: str) -> str:
    """inputs -> INPUT"""
    return positional.upper().removesuffix("S")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def _add_flag(parser: argparse._ActionsContainer, key: str, field: "FieldInfo") -> None:
    flag = "--" + (field.alias or key).replace("_", "-")
    text = (field.description or "").replace("%", "%%") + _default_note(key, field)
    if field.annotation is bool:
        parser.add_argument(flag, dest=key, action="store_true", help=text)
        parser.add_argument(_off(flag), dest=key, action="store_false", help=argparse.SUPPRESS)
    elif _is_list(field):
        parser.add_argument(flag, dest=key, action="append", metavar="TEXT", help=text)
    else:
        parser.add_argument(flag, dest=key, metavar=_metavar(field.annotation), help=text)


def _default_note(key: str, field: "FieldInfo") -> str:
    if key == "preset":
        return ": " + ", ".join(importlib.import_module("gptopt.config").PRESETS)
    if field.is_required():
        return " (required)"
    if field.default is True:
        return f" (default; {_off('--' + key.replace('_', '-'))} turns it off)"
    if field.default is None or field.default is False or _is_list(field):
        return ""
    return f" (default: {field.default})"


def _off(flag: str) -> str:
    """--model.bias -> --model.no-bias"""
    group, dot, leaf = flag.removeprefix("--").rpartition(".")
    return f"--{group}{dot}no-{leaf}"


def _leaves(options: "type[BaseModel]", prefix: str = "") -> Iterator[tuple[str, "FieldInfo"]]:
    """Every option with its dotted name; nested groups are opened."""
    for key, field in options.model_fields.items():
        if _is_group(field.annotation):
            yield from _leaves(typing.cast(Any, field.annotation), f"{prefix}{key}.")
        else:
            yield prefix + key, field


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "model_fields")


def _is_list(field: "FieldInfo") -> bool:
    return typing.get_origin(field.annotation) is list


def _metavar(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (typing.Union, UnionType):
        return _metavar(next(item for item in arguments if item is not type(None)))
    if origin is typing.Annotated:
        return _metavar(arguments[0])
    return {int: "N", float: "X"}.get(annotation, "TEXT")


def _read_toml(file: str | None, options: "type[BaseModel]") -> Values:
    if file is None:
        return {}
    path = Path(file)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path}: not valid TOML ({first_line(error)})") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply") from None
    values = _flatten(content, options)
    known = {field.alias or key: key for key, field in _leaves(options)}
    for key in values:
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_hint(key, known)}")
    return {known[key]: value for key, value in values.items()}


def _flatten(content: Values, options: "type[BaseModel]", prefix: str = "") -> Values:
    values: Values = {}
    for raw, value in content.items():
        key = raw.replace("-", "_")
        field = options.model_fields.get(key)
        if field is not None and _is_group(field.annotation) and isinstance(value, dict):
            values |= _flatten(value, typing.cast(Any, field.annotation), f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _preset(name: Any) -> Values:
    if name is None:
        return {}
    presets: dict[str, Values] = importlib.import_module("gptopt.config").PRESETS
    if name not in presets:
        raise UserError(
            f"--preset {name}: unknown{_hint(str(name), presets)}; choose from {', '.join(presets)}"
        )
    return {f"model.{key}": value for key, value in presets[name]["model"].items()}


def _validate(
    name: str,
    options: "type[BaseModel]",
    values: Values,
    sources: dict[str, str],
    file: str | None,
) -> "BaseModel":
    from pydantic import ValidationError

    nested: Values = {}
    fields = dict(_leaves(options))
    for key, value in values.items():
        *groups, leaf = key.split(".")
        group = nested
        for part in groups:
            group = group.setdefault(part, {})
        # A flag is text: the word none stands for TOML's absent key.
        absent = sources[key] == "flag" and value == "none" and _takes_none(fields[key])
        group[fields[key].alias or leaf] = None if absent else value
    try:
        return options.model_validate(nested)
    except ValidationError as error:
        raise UserError(_explain(name, error, sources, file)) from None


def _takes_none(field: "FieldInfo") -> bool:
    return type(None) in typing.get_args(field.annotation)


def _explain(name: str, error: "ValidationError", sources: dict[str, str], file: str | None) -> str:
    """One line for the first of pydantic's complaints."""
    first = error.errors()[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))  # no place in a list
    flag = "--" + key.replace("_", "-")
    where = f"{file}: {key}" if sources.get(key) == "file" else f"gptopt {name}: {flag}"
    if first["type"] == "missing":
        needed = _metavar_of(key) if key == VERBS[name].positional else flag
        return f"gptopt {name}: {needed} is required; see gptopt {name} --help"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        where = f"gptopt {name}: {key}" if key else f"gptopt {name}"
        return f"{where}: {reason}"
    more = f" ({error.error_count() - 1} more like it)" if error.error_count() > 1 else ""
    return f"{where}: found {first['input']!r}; {reason[0].lower()}{reason[1:]}{more}"


def _announce(name: str, values: Values, sources: dict[str, str], verb: Verb) -> None:
    """Say where every value that is not a default came from."""
    shown = [
        f"{key}={value} ({sources[key]})"
        for key, value in values.items()
        if key != verb.positional and key not in ("json_output", "prompt")
    ]
    if shown:
        logger.info("%s: %s; all else default", name, ", ".join(shown))


def _hint(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
