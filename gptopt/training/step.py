"""One optimiser step, with nothing in it that waits for a GPU."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from gptopt.errors import Diverged, UserError, first_line
from gptopt.manifest import write_json
from gptopt.training.graph import StepGraph
from gptopt.training.hardware import require_compiler
from gptopt.training.metrics import Metrics
from gptopt.training.objective import Batch
from gptopt.training.optimiser import FUSED_DEVICES
from gptopt.training.parallel import gradient_norm, reducing, replicate
from gptopt.training.session import Session
from gptopt.training.spikes import SPIKES, spiked

logger = logging.getLogger(__name__)

DIVERGED = "diverged.json"


class Stepper:
    """Takes steps, and reads their losses when asked to.

    Each step leaves (loss, gradient norm, loss scale) on the device; `settle` reads all of them at
    once. A step whose gradients are not finite changes no weight: the fused optimiser skips it on
    the device, before anybody here knows. Of several ranks all have the same figures, so all skip.

    Attributes:
        lr: of the last step.
        grad_norm: of the last finite step that was read, before clipping.
        busy_seconds, busy_tokens, busy_steps: time spent in steps and what was read in it; the
            reader sets them back.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.options = session.options
        self.state = session.state
        self.lr = self.grad_norm = 0.0
        self.busy_seconds, self.busy_tokens, self.busy_steps = 0.0, 0, 0
        self._keywords = session.objective.keywords()
        self.reads_are_free = session.device.type == "cpu"
        self._dropout = session.model.drops
        self._parameters = [p for p in session.model.parameters() if p.requires_grad]
        self._module = replicate(session.model, session.world)
        self._forward: Callable[..., Any] = self._module
        self._guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if self.options.compile:
            require_compiler(session.device)
            self._forward = torch.compile(self._module)
            self._guard = _compile_errors
        self._one = torch.ones((), device=session.device)
        # A recorded step reads its rate from the device.
        self._rate = torch.zeros_like(self._one) if self.options.cuda_graph else None
        self._graph = StepGraph(self._whole_step) if self.options.cuda_graph else None
        self._unread: list[tuple[int, list[list[int]], Tensor]] = []

    def step(self, seconds: float, between: Callable[[], object] = lambda: None) -> None:
        """One optimiser step.

        Args:
            seconds: the run's age, which a time budget's schedule needs.
            between: called between micro-batches; what it raises leaves the run as it was before
                this step.
        """
        started = time.monotonic()
        session, state = self.session, self.state
        with self._undone_on_error(), session.rounded():
            self.lr = session.schedule.lr(state.step, seconds)
            self._set_rate(self.lr)
            batches = [session.batches.next() for _ in range(session.accumulate)]
            if self._graph is None:
                loss = self._differentiate(batches, between)
            else:
                figures = self._graph.step(self._inputs(batches[0]))
        if self._graph is None:
            figures = self._update(session.world.sum(loss))
        state.step += 1
        tokens = sum(batch.tokens for batch in batches)
        state.tokens += tokens
        self._unread.append((state.step, [batch.where for batch in batches], figures))
        self.busy_seconds += time.monotonic() - started
        self.busy_tokens += tokens
        self.busy_steps += 1

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        session = self.session
        position, dropout = session.batches.state_dict(), session.dropout.get_state()
        warm_end = session.schedule.warm_end
        try:
            yield
        except BaseException:
            session.batches.load_state_dict(position)
            session.dropout.set_state(dropout)
            session.schedule.warm_end = warm_end
            session.optimiser.zero_grad(set_to_none=True)
            raise

    def _set_rate(self, lr: float) -> None:
        if self._rate is not None:
            self._rate.fill_(lr)
        for group in self.session.optimiser.param_groups:
            group["lr"] = lr if self._rate is None else self._rate

    def _differentiate(self, batches: list[Batch], between: Callable[[], object]) -> Tensor:
        """Leave the gradients of all micro-batches; this rank's part () of the step's loss."""
        counted = max(1, sum(batch.total for batch in batches))
        losses = []
        for remaining, batch in zip(reversed(range(len(batches))), batches, strict=True):
            with reducing(self._module, now=remaining == 0):
                losses.append(self._forward_backward(batch, batch.counted / counted))
            if remaining:
                between()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _forward_backward(self, batch: Batch, part: float) -> Tensor:
        """One micro-batch: adds to the gradients; its part () of the step's loss stays there."""
        return self._backward(self._inputs(batch), part)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a forward pass reads of it, on the device; with dropout a seed, too."""
        inputs = {name: torch.from_numpy(value) for name, value in batch.inputs.items()}
        if self._dropout:
            inputs["seed"] = self._seed()
        return {name: self._to_device(value) for name, value in inputs.items()}

    def _whole_step(self, inputs: dict[str, Tensor]) -> Tensor:
        """All that a step of one micro-batch does on the device; its figures (3,)."""
        return self._update(self._backward(inputs, 1.0))

    def _backward(self, inputs: dict[str, Tensor], part: float) -> Tensor:
        session, inputs = self.session, dict(inputs)
        seed = inputs.pop("seed", None)
        with self._guard():
            with session.precision():
                loss = session.objective.loss(self._forward, inputs, seed=seed, **self._keywords)
            # The loss is a mean over targets, the step's that over all micro-batches and ranks.
            share = loss * part
            # Gradients are averaged over the ranks, where their sum is wanted.
            total = share * session.world.size
            (session.scaler.scale(total) if session.scaler else total).backward()
        return share.detach()

    def _update(self, loss: Tensor) -> Tensor:
        """Clip the gradients and take the step, or skip it; (loss, norm, scale) as (3,)."""
        optimiser, scaler, scale = self.session.optimiser, self.session.scaler, self._one
        if scaler is not None:
            scale = scaler.scale(self._one)
            scaler.unscale_(optimiser)
        norm = gradient_norm(self._parameters)
        kind = torch.promote_types(loss.dtype, torch.float32)
        figures = torch.stack((loss.to(kind), norm.to(kind), scale.to(kind)))
        if self.options.grad_clip:
            clip_grads_with_norm_(self._parameters, self.options.grad_clip, norm)
        if scaler is not None:
            scaler.step(optimiser)
            scaler.update()
        elif self.session.device.type in FUSED_DEVICES:
            # The protocol by which GradScaler, too, tells an optimiser to skip on the device.
            optimiser.grad_scale = None  # type: ignore[attr-defined]  # GradScaler's
            optimiser.found_inf = (~torch.isfinite(loss + norm)).float()  # type: ignore[attr-defined]  # same
            optimiser.step()
        elif math.isfinite(float(loss + norm)):
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return figures

    def _seed(self) -> Tensor:
        # All ranks draw for all, so that one generator's state resumes every one of them.
        world, dropout = self.session.world, self.session.dropout
        seeds = torch.randint(0, 2**63 - 1, (world.size,), generator=dropout, dtype=torch.int64)
        return seeds[world.rank]

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
                self._note_spike(step, offsets, loss)
            elif not math.isfinite(loss) or scale <= 1:
                # fp16 gradients that overflow at a larger scale are how GradScaler finds the scale.
                self._skip(step, offsets, loss, norm)

    def _note_spike(self, step: int, offsets: list[list[int]], loss: float) -> None:
        median = spiked(self.state.recent_losses, loss)
        if median is None or not self.session.world.is_first:
            return
        logger.warning(
            "step %d: the loss is %.4f, far above the %.4f of the steps before; what it read is in"
            " %s", step, loss, median, SPIKES,
        )  # fmt: skip
        line = {"step": step, "loss": loss, "median": median, "offsets": offsets}
        Metrics(self.session.out, SPIKES).append(line)

    def _skip(self, step: int, offsets: list[list[int]], loss: float, norm: float) -> None:
        self.state.skipped += 1
        what = f"step {step} is not finite (loss {loss}, gradient norm {norm})"
        if self.state.skipped <= self.options.max_skips:
            skips = f"{self.state.skipped} of {self.options.max_skips} skips used"
            logger.warning("%s; it changed nothing, %s", what, skips)
            return
        out = self.session.out
        told = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "last_finite_grad_norm": self.grad_norm,
            "lr": self.lr,
            "skipped": self.state.skipped,
            "offsets": offsets,  # of each micro-batch's sequences in the training split
            "sampler": self.session.batches.state_dict(),
        }
        if self.session.world.is_first:
            write_json(out / DIVERGED, told)
        self.session.saver.wait()
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
