"""`gptopt chat`: a conversation with a model folder or an exported one, with its history.

An exported folder keeps what it has read: a turn costs its own tokens, not the conversation's.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptopt.config import SamplingOptions
from gptopt.config_chat import ChatOptions
from gptopt.errors import UserError
from gptopt.finetune.chat import PLAIN, ChatTemplate, Message
from gptopt.log import say
from gptopt.runtime.folder import end_ids, is_edge_folder
from gptopt.runtime.generation import Completion, OnText
from gptopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HELP = (
    "/new begins again, /undo takes back the last turn, /exit or Ctrl-D ends; Ctrl-C stops a reply"
)
_LEAST_ROOM = 16  # tokens of a reply for which the oldest turns are dropped


class Talker(Protocol):
    """A model that continues one prompt, and may know the beginning of it already."""

    block_size: int
    tokenizer: Tokenizer

    def reply(self, prompt: list[int], sampling: SamplingOptions, on_text: OnText) -> Completion:
        """Continue the prompt until it ends."""

    def forget(self) -> None:
        """What was read last may be broken off anywhere."""


class Conversation:
    """The turns so far, and what the model has to read to answer.

    Args:
        talker: the model.
        template: how a conversation is spelled.
        sampling: how replies are chosen.
        system: what the model is told first, if anything.
    """

    def __init__(
        self, talker: Talker, template: ChatTemplate, sampling: SamplingOptions, system: str | None
    ) -> None:
        self._talker, self._template, self._sampling = talker, template, sampling
        self._first: list[Message] = [] if system is None else [_message("system", system)]
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*self._first, *self._turns]

    def ask(self, text: str, on_text: OnText) -> Completion:
        """The model's reply, which joins the conversation.

        Where the context is full, the oldest turns are left out, and that is told.

        Raises:
            UserError: the message alone is longer than the model's context, or the template fails.
        """
        prompt, dropped = self._fitting([*self._turns, _message("user", text)])
        if dropped:
            logger.warning(
                "the context is full: the oldest %d messages are no longer read", dropped
            )
        said: list[str] = []

        def heard(row: int, piece: str) -> None:
            said.append(piece)
            on_text(row, piece)

        try:
            done = self._talker.reply(prompt, self._sampling, heard)
        except KeyboardInterrupt:
            self._talker.forget()
            self._turns += [_message("user", text), _message("assistant", "".join(said))]
            raise
        self._turns += [_message("user", text), _message("assistant", done.rows[0].text)]
        return done

    def _fitting(self, turns: list[Message]) -> tuple[list[int], int]:
        """The tokens to read, and how many messages had to be left out for that."""
        size = self._talker.block_size
        room = min(self._sampling.max_new_tokens, _LEAST_ROOM, size // 2)
        for dropped in range(0, len(turns), 2):
            prompt = self._template.prompt([*self._first, *turns[dropped:]])
            if len(prompt) <= size - room:
                return prompt, dropped
        raise UserError(
            f"the message has {len(prompt)} tokens as the template spells it, the model sees {size}"
            f" and needs {room} to answer; shorten it"
        )

    def undo(self) -> bool:
        """Take back the last turn; False where there is none."""
        found = bool(self._turns)
        del self._turns[-2:]
        return found

    def clear(self) -> None:
        """Begin again, with what the model was told first."""
        self._turns.clear()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def chat(options: ChatOptions) -> dict[str, Any]:
    """Read messages from the terminal or from stdin, one a line, and show the replies.

    Returns:
        messages (role and content of each), turns, new_tokens, tokens_per_second (of the last
        reply; null where it had one token), and device or provider.

    Raises:
        UserError: the model or the template cannot be used, or a message does not fit.
    """
    talker, where = _open(options)
    source, name = _template(options, talker.tokenizer)
    if source == PLAIN:
        # A model that was never taught to stop goes on with the next question.
        options = options.model_copy(update={"stop": [*options.stop, "\nuser:"]})
    template = ChatTemplate(source, talker.tokenizer, where=name)
    conversation = Conversation(talker, template, options, options.system)
    shown = not options.json_output
    live = sys.stdin.isatty()
    if live:
        logger.info("%s", HELP)
    new_tokens, turns, speed = 0, 0, None
    for text in _lines(live):
        if text.startswith("/"):
            if not _command(text, conversation):
                break
            continue
        try:
            done = conversation.ask(text, lambda _, piece: say(piece, end="") if shown else None)
        except KeyboardInterrupt:
            if not live:
                raise
            say()
            continue
        turns, new_tokens, speed = turns + 1, new_tokens + done.new_tokens, done.tokens_per_second
        if shown:
            say()
        if done.rows[0].finish_reason == "context":
            logger.warning("the context is full, so the reply ends here; /new begins again")
    return {
        "messages": conversation.messages,
        "turns": turns,
        "new_tokens": new_tokens,
        "tokens_per_second": None if speed is None else round(speed, 2),
        **where,
    }


def _lines(live: bool) -> Iterator[str]:
    """Messages, without empty ones; at a terminal with its line editing."""
    if live:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() editing and history
    while True:
        try:
            line = input("> ") if live else sys.stdin.readline()
        except EOFError:
            say()
            return
        if not live and not line:
            return
        if text := line.strip():
            yield text


def _command(text: str, conversation: Conversation) -> bool:
    """Obey a command; False ends the conversation."""
    if text in ("/exit", "/quit"):
        return False
    if text == "/new":
        conversation.clear()
    elif text == "/undo":
        if not conversation.undo():
            logger.warning("there is no turn to take back")
    else:
        known = text == "/help"
        logger.info("%s", HELP if known else f"{text.split()[0]} is not a command: {HELP}")
    return True


def _template(options: ChatOptions, tokenizer: Tokenizer) -> tuple[str, str]:
    """The template's source, and what it is called in messages."""
    if options.chat_template is not None:
        path = Path(options.chat_template)
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"--chat-template {path}: cannot be read ({reason})") from None
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template, f"{options.model}: chat_template"
    logger.warning(
        "%s: has no chat template, so turns are spelled plainly; a model that was not fine-tuned "
        "to reply continues text, it does not answer",
        options.model,
    )
    return PLAIN, "the plain template"


def _open(options: ChatOptions) -> tuple[Talker, dict[str, str]]:
    edge = is_edge_folder(Path(options.model))
    if edge and options.checkpoint != "auto":
        raise UserError(f"{options.model}: is an exported folder, which knows no --checkpoint")
    if not edge and options.precision != "auto":
        raise UserError(f"{options.model}: is not an exported folder, it knows no --precision")
    return _edge_talker(options) if edge else _torch_talker(options)


def _edge_talker(options: ChatOptions) -> tuple[Talker, dict[str, str]]:
    from gptopt.runtime.edge import EdgeModel

    provider = "cpu" if options.device == "auto" else options.device
    model = EdgeModel(
        Path(options.model), provider=provider, precision=options.precision, adapter=options.adapter
    )
    found = model.tokenizer

    class Edge:
        block_size = model.block_size
        tokenizer = _readable(options.model, found)

        def __init__(self) -> None:
            self.forget()

        def reply(
            self, prompt: list[int], sampling: SamplingOptions, on_text: OnText
        ) -> Completion:
            return model.complete([prompt], sampling, on_text=on_text, cache=self._cache)

        def forget(self) -> None:
            self._cache = model.new_cache()

    return Edge(), {"provider": model.provider, "precision": model.precision}


def _torch_talker(options: ChatOptions) -> tuple[Talker, dict[str, str]]:
    from gptopt.checkpoint import load_model
    from gptopt.generate import generate_tokens
    from gptopt.training.hardware import resolve_device

    device = resolve_device(options.device)
    loaded = load_model(
        options.model, checkpoint=options.checkpoint, device=device, adapter=options.adapter
    )
    readable = _readable(options.model, loaded.tokenizer)
    ends: Sequence[int] = sorted({readable.eos_id, *end_ids(loaded.folder)})

    class Torch:
        block_size = loaded.model.config.block_size
        tokenizer = readable

        def reply(
            self, prompt: list[int], sampling: SamplingOptions, on_text: OnText
        ) -> Completion:
            return generate_tokens(
                loaded.model, [prompt], sampling,
                tokenizer=readable, end_ids=ends, on_text=on_text,
            )  # fmt: skip

        def forget(self) -> None:
            """Every turn is read anew."""

    return Torch(), {"device": str(device)}


def _readable(model: str, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it reads no text")
    return tokenizer
