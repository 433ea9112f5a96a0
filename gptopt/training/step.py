"""One optimiser step, with nothing in it that waits for a GPU."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gptopt.errors import Diverged, UserError, first_line
from gptopt.manifest import write_json
from gptopt.training.hardware import require_compiler
from gptopt.training.optimiser import FUSED_DEVICES
from gptopt.training.session import Session

logger = logging.getLogger(__name__)

DIVERGED = "diverged.json"


class Stepper:
    """Takes steps, and reads their losses when asked to.

    Each step leaves (loss, gradient norm, loss scale) on the device; `settle` reads all of them at
    once. A step whose gradients are not finite changes no weight: the fused optimiser skips it on
    the device, before anybody here knows.

    Attributes:
        lr: of the last step.
        grad_norm: of the last finite step that was read, before clipping.
        busy_seconds, busy_steps: time spent in steps; the reader sets them back.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.options = session.options
        self.state = session.state
        self.lr = self.grad_norm = 0.0
        self.busy_seconds, self.busy_steps = 0.0, 0
        self.block_size = session.model.config.block_size
        self.tokens_per_step = self.options.batch_size * self.options.accumulate * self.block_size
        self.reads_are_free = session.device.type == "cpu"
        self._dropout = session.model.config.dropout > 0
        self._parameters = [p for p in session.model.parameters() if p.requires_grad]
        self._forward: Callable[..., Any] = session.model
        self._guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if self.options.compile:
            require_compiler(session.device)
            self._forward = torch.compile(session.model)
            self._guard = _compile_errors
        self._one = torch.ones((), device=session.device)
        self._unread: list[tuple[int, list[list[int]], Tensor]] = []

    def step(self, seconds: float) -> None:
        """One optimiser step; `seconds` is the run's age, which a time budget's schedule needs."""
        started = time.monotonic()
        state, options = self.state, self.options
        self.lr = self.session.schedule.lr(state.step, seconds)
        for group in self.session.optimiser.param_groups:
            group["lr"] = self.lr
        losses, offsets = [], []
        for _ in range(options.accumulate):
            chosen = self.session.sampler.next()
            offsets.append(chosen.tolist())
            losses.append(self._forward_backward(chosen))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        state.step += 1
        state.tokens += self.tokens_per_step
        self._unread.append((state.step, offsets, self._update(loss)))
        self.busy_seconds += time.monotonic() - started
        self.busy_steps += 1

    def _forward_backward(self, offsets: npt.NDArray[np.int64]) -> Tensor:
        """One micro-batch: adds to the gradients; its loss () stays on the device."""
        session, options = self.session, self.options
        block = self._to_device(
            torch.from_numpy(session.dataset.train.batch(offsets, self.block_size))
        )  # (B, T + 1)
        with self._guard():
            with session.precision():
                loss: Tensor = self._forward(
                    block[:, :-1], block[:, 1:], seed=self._seed(),
                    label_smoothing=options.label_smoothing, z_loss=options.z_loss,
                ).loss  # fmt: skip
            # Micro-batches have equally many tokens: the mean of their means is the batch's mean.
            share = loss if options.accumulate == 1 else loss / options.accumulate
            (session.scaler.scale(share) if session.scaler else share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self, loss: Tensor) -> Tensor:
        """Clip the gradients and take the step, or skip it; (loss, norm, scale) as (3,) fp32."""
        optimiser, scaler, scale = self.session.optimiser, self.session.scaler, self._one
        if scaler is not None:
            scale = scaler.scale(self._one)
            scaler.unscale_(optimiser)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        figures = torch.stack((loss.float(), norm.float(), scale))
        if self.options.grad_clip:
            clip_grads_with_norm_(self._parameters, self.options.grad_clip, norm)
        if scaler is not None:
            scaler.step(optimiser)
            scaler.update()
        elif self.session.device.type in FUSED_DEVICES:
            # The protocol by which GradScaler, too, tells an optimiser to skip on the device.
            optimiser.grad_scale = None  # type: ignore[attr-defined]
            optimiser.found_inf = (~torch.isfinite(loss + norm)).float()  # type: ignore[attr-defined]
            optimiser.step()
        elif math.isfinite(float(loss + norm)):
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return figures

    def _seed(self) -> Tensor | None:
        if not self._dropout:
            return None
        return self._to_device(
            torch.randint(0, 2**63 - 1, (), generator=self.session.dropout, dtype=torch.int64)
        )

    def _to_device(self, value: Tensor) -> Tensor:
        if self.session.device.type != "cuda":
            return value.to(self.session.device)
        return value.pin_memory().to(self.session.device, non_blocking=True)

    # --- reading what the steps left on the device ------------------------------------------------

    def settle(self) -> None:
        """Read the losses and norms of the steps since the last call; waits for the device.

        Raises:
            Diverged: more steps than max_skips were not finite.
        """
        if not self._unread:
            return
        started = time.monotonic()
        rows = torch.stack([row for _, _, row in self._unread]).tolist()
        self.busy_seconds += time.monotonic() - started
        unread, self._unread = self._unread, []
        for (step, offsets, _), (loss, norm, scale) in zip(unread, rows, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                self.grad_norm = norm
                self.state.loss_sum += loss
                self.state.loss_count += 1
            elif not math.isfinite(loss) or scale <= 1:
                # fp16 gradients that overflow at a larger scale are how GradScaler finds the scale.
                self._skip(step, offsets, loss, norm)

    def _skip(self, step: int, offsets: list[list[int]], loss: float, norm: float) -> None:
        self.state.skipped += 1
        what = f"step {step} is not finite (loss {loss}, gradient norm {norm})"
        if self.state.skipped <= self.options.max_skips:
            skips = f"{self.state.skipped} of {self.options.max_skips} skips used"
            logger.warning("%s; it changed nothing, %s", what, skips)
            return
        out = self.session.out
        write_json(
            out / DIVERGED,
            {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(norm),
                "last_finite_grad_norm": self.grad_norm,
                "lr": self.lr,
                "skipped": self.state.skipped,
                "offsets": offsets,  # of each micro-batch's sequences in the training split
                "sampler": self.session.sampler.state_dict(),
            },
        )
        kept = self.session.checkpoints.pointed("latest")
        saved = f"{kept.name} is kept" if kept else "no checkpoint was due yet"
        raise Diverged(
            f"{out}: {what}; {saved} and the batch is in {DIVERGED}; train anew with a lower --lr,"
            f" or --resume with --max-skips"
        )


@contextlib.contextmanager
def _compile_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile failed ({first_line(error)}); drop --compile") from error
        raise
