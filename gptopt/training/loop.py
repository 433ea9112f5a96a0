"""The training loop: step, save, evaluate, log, sample, in that order, until the run is done."""

import logging
import signal
import time
from typing import Any

from gptopt.errors import Interrupted
from gptopt.log import Progress, progress
from gptopt.training.judge import evaluate, sample
from gptopt.training.metrics import Metrics
from gptopt.training.report import Report
from gptopt.training.session import Session
from gptopt.training.signals import SignalCame, Signals
from gptopt.training.state import Todo
from gptopt.training.step import Stepper
from gptopt.training.trackers import Trackers

logger = logging.getLogger(__name__)


class Trainer:
    """Takes a session to its end, or to a signal, and leaves it saved.

    Args:
        session: the run.
        peak: measured matmul peak in operations per second, None where unknown.
        trackers: hear what metrics.jsonl gets.
    """

    def __init__(self, session: Session, peak: float | None, trackers: Trackers) -> None:
        self.session = session
        self.options = session.options
        self.state = session.state
        self.stepper = Stepper(session)
        self.report = Report(session, self.stepper, peak)
        self.metrics, self.trackers = Metrics(session.out), trackers
        self.signals = Signals(patient=session.world.size > 1)
        self._todo: Todo | None = None  # what is not done yet of the step just taken
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
        with self.signals, self.session.saver, progress(total, "steps") as self._shown:
            self._shown.done = self.state.step
            try:
                if self.state.todo is not None:  # killed after saving, before finishing the step
                    self._finish(self.state.todo)
                while not self.state.stopped_by:
                    self.stepper.step(self._heed(), self._heed)
                    self._after_step()
            except SignalCame as came:
                self._stop(came.number)

    def _heed(self) -> float:
        """What ranks agree on before they go on together: the run's age in seconds.

        Raises:
            SignalCame: on any of them.
            UserError: a checkpoint could not be written.
        """
        caught, failed = self.signals.caught or 0, self.session.saver.failed
        beat = [float(caught), self.report.seconds(), float(failed)]
        number, seconds, failure = self.session.world.control.largest(beat)
        if failure:
            self.session.saver.wait()
        if number:
            raise SignalCame(signal.Signals(int(number)))
        return seconds

    def _after_step(self) -> None:
        options = self.options
        self._check_budget()
        log, evaluation = self._due(options.log_every), self._due(options.eval_every)
        save = self._due(options.checkpoint_every)
        if self.stepper.reads_are_free or log or evaluation or save:
            self.stepper.settle()
        todo = Todo(
            line=self.report.line() if log or evaluation else None,
            evaluate=evaluation,
            sample=options.sample_every > 0 and self._due(options.sample_every),
        )
        if save:
            self._save(todo)
        self._finish(todo)

    def _due(self, every: int) -> bool:
        """Whether the step just taken is the last one or one of every so many (0: last only)."""
        return bool(self.state.stopped_by) or (every > 0 and self.state.step % every == 0)

    def _check_budget(self) -> None:
        if self.state.step >= self.options.steps:
            self.state.stopped_by = "steps"
        elif self.options.max_seconds is not None:
            # Another step would take about as long as the average one so far.
            end = self.report.seconds() + self.report.seconds_per_step()
            if self.session.world.control.largest([end])[0] > self.options.max_seconds:
                self.state.stopped_by = "time"
                self.state.budget_seconds = self.options.max_seconds

    def _finish(self, todo: Todo) -> None:
        """What follows a step's save: evaluation, the line, the best checkpoint, a sample."""
        best = False
        self._todo = todo
        if self._shown is not None and (todo.evaluate or todo.sample):
            self._shown.close()  # the live line makes way for lines that stay
        if todo.line is not None:
            if todo.evaluate:
                best = self._evaluate(todo.line)
            if self.session.world.is_first:
                self.metrics.append(todo.line)
                self.trackers.log(todo.line)
                self._show(todo.line)
        self._todo = self.state.todo = Todo(None, False, True) if todo.sample else None
        if best:
            if self._saved_step != self.state.step:
                self._save(self._todo)
            self.session.saver.mark_best(self.state.step)
        if todo.sample:
            sample(self.session)
        self._todo = self.state.todo = None

    def _evaluate(self, line: dict[str, Any]) -> bool:
        """Add val_loss to the line; whether it is the best so far."""
        state = self.state
        started = time.monotonic()
        figures = evaluate(self.session, self._heed)
        if figures is None:
            return False
        line |= figures
        state.val_loss = value = figures["val_loss"]
        best = state.best_val_loss is None or value < state.best_val_loss
        if best:
            state.best_val_loss, state.best_step = value, state.step
        logger.info(
            "step %d: train loss %s, %s%s (%.1f s)",
            state.step,
            "-" if line["loss"] is None else f"{line['loss']:.4f}",
            ", ".join(f"{name.replace('_', ' ')} {each:.4f}" for name, each in figures.items()),
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
        self.session.saver.save()
        self._saved_step = self.state.step

    def _stop(self, number: signal.Signals) -> None:
        """Leave the run saved; what is not done of the last step is done by a resume."""
        if self._saved_step != self.state.step:
            self._save(self._todo)
        self.session.saver.wait()
        raise Interrupted(
            f"{self.session.out}: {number.name}, saved at step {self.state.step}; continue with"
            f" the same command and --resume",
            128 + number,
        )
