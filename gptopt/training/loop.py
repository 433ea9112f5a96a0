"""The training loop: step, save, evaluate, log, sample, in that order, until the run is done."""

import logging
import time
from typing import Any

from gptopt.errors import Interrupted
from gptopt.log import Progress, progress
from gptopt.training.judge import evaluate, sample
from gptopt.training.metrics import Metrics
from gptopt.training.report import Report
from gptopt.training.session import Session
from gptopt.training.signals import Signals
from gptopt.training.state import Todo
from gptopt.training.step import Stepper

logger = logging.getLogger(__name__)


class Trainer:
    """Takes a session to its end, or to a signal, and leaves it saved.

    Args:
        session: the run.
        peak: measured matmul peak in operations per second, None where unknown.
    """

    def __init__(self, session: Session, peak: float | None) -> None:
        self.session = session
        self.options = session.options
        self.state = session.state
        self.stepper = Stepper(session)
        self.report = Report(session, self.stepper, peak)
        self.metrics = Metrics(session.out)
        self.signals = Signals()
        self._saved_step = self.state.step
        self._shown: Progress | None = None

    def run(self) -> None:
        """Train until the steps or the seconds are used up.

        Raises:
            Diverged: too many steps were not finite.
            Interrupted: a signal came; the run is saved.
            UserError: a checkpoint or a line cannot be written.
        """
        total = None if self.options.max_seconds else self.options.steps
        self.report.start()
        with self.signals, progress(total, "steps") as self._shown:
            self._shown.done = self.state.step
            if self.state.todo is not None:  # killed after saving, before finishing the step
                self._finish(self.state.todo)
            while not self.state.stopped_by:
                self.stepper.step(self.report.seconds())
                self._after_step()

    def _after_step(self) -> None:
        options, caught = self.options, self.signals.caught
        self._check_budget()
        log, evaluation = self._due(options.log_every), self._due(options.eval_every)
        save = self._due(options.checkpoint_every) or caught is not None
        if self.stepper.reads_are_free or log or evaluation or save:
            self.stepper.settle()
        todo = Todo(
            line=self.report.line() if log or evaluation else None,
            evaluate=evaluation,
            sample=options.sample_every > 0 and self._due(options.sample_every),
        )
        if save:
            self._save(todo)
        if caught and not self.state.stopped_by and (todo.evaluate or todo.sample):
            self._stop()  # whoever sent the signal may not wait; a resume does what is due here
        self._finish(todo)
        if self.signals.caught and not self.state.stopped_by:
            self._stop()

    def _due(self, every: int) -> bool:
        """Whether the step just taken is the last one or one of every so many (0: last only)."""
        return bool(self.state.stopped_by) or (every > 0 and self.state.step % every == 0)

    def _check_budget(self) -> None:
        if self.state.step >= self.options.steps:
            self.state.stopped_by = "steps"
        elif self.options.max_seconds is not None and (
            # Another step would take about as long as the average one so far.
            self.report.seconds() + self.report.seconds_per_step() > self.options.max_seconds
        ):
            self.state.stopped_by = "time"
            self.state.budget_seconds = self.options.max_seconds

    def _finish(self, todo: Todo) -> None:
        """What follows a step's save: evaluation, the line, the best checkpoint, a sample."""
        best = False
        if self._shown is not None and (todo.evaluate or todo.sample):
            self._shown.close()  # the live line makes way for lines that stay
        if todo.line is not None:
            if todo.evaluate:
                best = self._evaluate(todo.line)
            self.metrics.append(todo.line)
            self._show(todo.line)
        self.state.todo = None
        if best:
            if self._saved_step != self.state.step:
                self._save(None)
            self.session.checkpoints.mark_best(self.state.step)
            self.session.checkpoints.prune(self.options.keep_checkpoints)
        if todo.sample:
            sample(self.session)

    def _evaluate(self, line: dict[str, Any]) -> bool:
        """Add val_loss to the line; whether it is the best so far."""
        state = self.state
        started = time.monotonic()
        value = evaluate(self.session)
        if value is None:
            return False
        state.val_loss = line["val_loss"] = value
        best = state.best_val_loss is None or value < state.best_val_loss
        if best:
            state.best_val_loss, state.best_step = value, state.step
        logger.info(
            "step %d: train loss %s, val loss %.4f%s (%.1f s)",
            state.step,
            "-" if line["loss"] is None else f"{line['loss']:.4f}",
            value,
            ", the best so far" if best else "",
            time.monotonic() - started,
        )
        return best

    def _show(self, line: dict[str, Any]) -> None:
        assert self._shown is not None
        figures: dict[str, Any] = {"loss": line["loss"], "lr": line["lr"]}
        if self.state.val_loss is not None:
            figures["val"] = self.state.val_loss
        if line["tokens_per_second"]:
            figures["tok/s"] = round(line["tokens_per_second"])
        if line["mfu"]:
            figures["mfu"] = f"{line['mfu']:.0%}"
        figures["left"] = f"{line['eta_seconds']:.0f} s"
        self._shown.update(line["step"] - self._shown.done, **figures)

    def _save(self, todo: Todo | None) -> None:
        self.stepper.settle()
        self.state.seconds = self.report.seconds()
        self.state.todo = todo
        self.session.save()
        self._saved_step = self.state.step

    def _stop(self) -> None:
        if self._saved_step != self.state.step:
            self._save(None)
        caught = self.signals.caught
        assert caught is not None
        raise Interrupted(
            f"{self.session.out}: {caught.name}, saved at step {self.state.step}; continue with"
            f" the same command and --resume",
            self.signals.exit_code,
        )
