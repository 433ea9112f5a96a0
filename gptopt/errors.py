"""What a user can get wrong, and the exit code each kind of mistake ends with."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing, what was found and what to do.

    What it quotes of a stranger's file cannot break that line, or speak to the terminal.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(shown))


class CheckFailed(UserError):
    """A proof or an integrity check did not hold."""

    exit_code = 1


class Diverged(UserError):
    """Training produced numbers that are not finite."""

    exit_code = 3


class Interrupted(UserError):
    """A signal ended the work after everything worth keeping was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # 130 for SIGINT, 143 for SIGTERM


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that quote a library's own error."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
