"""Conversations as text: a chat template in a sandbox, and which of its tokens are replies.

A template is a program that came with a model: it runs in Jinja's immutable sandbox and sees
nothing but the messages. What users wrote is guarded on its way through it, so that a control token
spelled out inside a message stays the plain characters that it is.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from gptopt.errors import UserError, first_line
from gptopt.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
# Stands inside of guarded control tokens while a template runs; no text has it, and none may.
_GUARD = "\U0010fffd"

Message = dict[str, str]
Parts = list[tuple[list[int], bool]]  # tokens, and whether they are part of a reply


class ChatTemplate:
    """A compiled chat template and the tokenizer whose control tokens it writes.

    Args:
        source: Jinja source, as transformers reads it from a tokenizer.
        tokenizer: of the model.
        parse_control: take control tokens inside of messages as what they name.
        where: the template's file, for messages.

    Raises:
        UserError: the source is no Jinja.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, parse_control: bool = False,
        where: str = "chat_template",
    ) -> None:  # fmt: skip
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer, self._parse_control, self._where = tokenizer, parse_control, where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_tag()],
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        self._errors = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError,
                        AttributeError, RecursionError)  # fmt: skip
        try:
            self._template = environment.from_string(source)
        except self._errors as error:
            raise UserError(
                f"{where}: is no Jinja template ({first_line(error)}); give another one with"
                f" --chat-template"
            ) from None
        self._guarded = [name for id_ in tokenizer.control_ids if (name := tokenizer.token(id_))]

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of a conversation; with `ask` it ends where the next reply begins.

        Raises:
            UserError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[dict(each) for each in messages],
                add_generation_prompt=ask,
                tools=None,
                documents=None,
                **self._tokenizer.control_names,
            )
        except self._errors as error:
            raise UserError(
                f"{self._where}: the template fails on this conversation ({first_line(error)})"
            ) from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that ask for the next reply.

        Raises:
            UserError: the template refuses the messages.
        """
        guarded = [{**each, "content": self._guard(each["content"])} for each in messages]
        return self._encode(self.render(guarded, ask=True))

    def parts(self, messages: Sequence[Message]) -> Parts:
        """The tokens of a conversation, cut where replies begin and end.

        A reply is what the template adds to the text that asks for it: it is encoded by itself,
        as it is when a model generates it.

        Raises:
            UserError: the template spells a beginning otherwise once more messages follow.
        """
        guarded = [{**each, "content": self._guard(each["content"])} for each in messages]
        whole, cuts = self.render(guarded), [0]
        for index, message in enumerate(guarded):
            if message["role"] != "assistant":
                continue
            before = self.render(guarded[:index], ask=True)
            after = self.render(guarded[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{self._where}: spells the beginning of a conversation otherwise once message"
                    f" {index + 1} follows, so its reply cannot be told apart; give another"
                    f" template with --chat-template, or one reply for each example"
                )
            cuts += [len(before), len(after)]
        cuts.append(len(whole))
        pieces = [whole[start:end] for start, end in pairwise(cuts)]
        return [(self._encode(piece), index % 2 == 1) for index, piece in enumerate(pieces)]

    def _encode(self, text: str) -> list[int]:
        """Control tokens that the template wrote are parsed, guarded ones are spelled out."""
        return self._tokenizer.encode_with_control(text, guard=_GUARD)

    def _guard(self, content: str) -> str:
        if _GUARD in content:
            raise UserError(f"the text holds {_GUARD!r}, which stands for nothing; remove it")
        if self._parse_control:
            return content
        for name in self._guarded:
            if len(name) == 1 and name in content:
                raise UserError(
                    f"the text holds {name!r}, which is a control token of the model; remove it, or"
                    f" have such tokens taken as what they name with --parse-control"
                )
            content = content.replace(name, name[:1] + _GUARD + name[1:])
        return content


def check_roles(messages: Any) -> list[Message]:
    """A conversation that can be learned from: [system] (user assistant)+, all of them text.

    Raises:
        UserError: it is not one; the line says which message is wrong, and why.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"expected a list of messages, found {_kind(messages)}")
    checked: list[Message] = []
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number}: expected an object, found {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "nothing"
                raise UserError(f"message {number}: expected text as {key!r}, found {found}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"message {number}: role {role!r}, expected one of {', '.join(ROLES)}")
        if role not in expected:
            before = f"after {checked[-1]['role']}" if checked else "first"
            raise UserError(
                f"message {number}: roles out of order, {role!r} comes {before}; expected"
                f" {' or '.join(expected)}"
            )
        if role == "assistant" and not content.strip():
            raise UserError(f"message {number}: the reply is empty, so there is nothing to learn")
        expected = ("assistant",) if role == "user" else ("user",)
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] != "assistant":
        raise UserError(
            f"message {len(checked)}: the conversation ends with {checked[-1]['role']!r}, so there"
            f" is no reply to learn"
        )
    return checked


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "an empty list" if value == [] else type(value).__name__


def _generation_tag() -> Any:
    """`{% generation %}`, with which some templates mark replies: here what it holds is text."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise(message: str) -> None:
    raise ValueError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML that Jinja's own filter adds."""
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
