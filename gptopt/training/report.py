"""The figures of a run: how fast, how far, how long to go."""

import time
from typing import Any

from gptopt.training.hardware import flops_per_token, memory_bytes
from gptopt.training.session import Session
from gptopt.training.step import Stepper


class Report:
    """Turns the steps since the last line into a line of metrics.jsonl."""

    def __init__(self, session: Session, stepper: Stepper, peak: float | None) -> None:
        self.session, self.state, self.stepper = session, session.state, stepper
        self._peak = peak
        self._flops = flops_per_token(session.model, session.objective.block_size)
        self._steps_before, self._seconds_before = self.state.step, self.state.seconds
        self._began = time.monotonic()

    def start(self) -> None:
        """The clock begins here."""
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Age of the run over all its resumes: training, evaluation and saving."""
        return self._seconds_before + time.monotonic() - self._began

    def seconds_per_step(self) -> float:
        """Mean over this process's steps, with what happens between them; 0 before the first."""
        steps = self.state.step - self._steps_before
        return (time.monotonic() - self._began) / steps if steps else 0.0

    def line(self) -> dict[str, Any]:
        """One line of metrics.jsonl, and a fresh start for the next one's means."""
        state, stepper = self.state, self.stepper
        loss = state.loss_sum / state.loss_count if state.loss_count else None
        step_seconds = stepper.busy_seconds / stepper.busy_steps if stepper.busy_steps else None
        rate = stepper.busy_tokens / stepper.busy_seconds if stepper.busy_steps else None
        mfu = rate * self._flops / self._peak if rate and self._peak else None
        if mfu is not None and mfu > 1:
            mfu = None  # other work slowed the probe: the peak is not known after all
        state.seconds = self.seconds()
        if loss is not None:
            state.train_loss = loss
        state.tokens_per_second, state.mfu = rate, mfu
        state.loss_sum, state.loss_count = 0.0, 0
        waited, self.session.batches.waited = self.session.batches.waited, 0.0
        steps = max(1, stepper.busy_steps)
        stepper.busy_seconds, stepper.busy_tokens, stepper.busy_steps = 0.0, 0, 0
        return {
            "step": state.step,
            "loss": loss,
            "lr": stepper.lr,
            "grad_norm": stepper.grad_norm,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "step_ms": 1000 * step_seconds if step_seconds else None,
            "data_wait_ms": 1000 * waited / steps,
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory_bytes": memory_bytes(self.session.device),
            "eta_seconds": self._eta(),
            "skipped": state.skipped,
        }

    def _eta(self) -> float:
        options = self.session.options
        eta = self.seconds_per_step() * (options.steps - self.state.step)
        if options.max_seconds is not None:
            eta = min(eta, options.max_seconds - self.state.seconds)
        return max(0.0, eta)
