"""Validation figures and samples while training; neither draws from the run's random numbers."""

import logging
import math
from collections.abc import Callable

from gptopt.errors import UserError
from gptopt.evaluate import Share
from gptopt.manifest import write_text
from gptopt.training.objective import Figures
from gptopt.training.session import Session

logger = logging.getLogger(__name__)

SAMPLES = "samples"


def evaluate(session: Session, heed: Callable[[], object]) -> Figures | None:
    """The objective's figures on what was held out, None where nothing was.

    `heed` is called before every batch; what it raises ends the evaluation.
    """
    world = session.world
    share = Share(world.rank, world.size, world.control.total)
    hook = session.model.register_forward_pre_hook(lambda *arguments: heed() and None)
    try:
        with session.precision(), session.rounded():
            figures = session.objective.evaluate(session.model, share)
    finally:
        hook.remove()
    figures = world.control.from_first(figures)
    if figures is None or math.isfinite(figures["val_loss"]):
        return figures
    logger.warning("step %d: the validation loss is %s", session.state.step, figures["val_loss"])
    return None


def sample(session: Session) -> None:
    """What the model says by now; into RUN/samples and onto the screen."""
    if not session.world.is_first:
        return
    try:
        with session.rounded():
            text = session.objective.sample(session.model)
    except UserError as error:
        logger.warning("no sample at step %d: %s", session.state.step, error)
        return
    if text is None:
        return
    folder = session.out / SAMPLES
    folder.mkdir(exist_ok=True)
    write_text(folder / f"step-{session.state.step:06d}.txt", text + "\n")
    logger.info("sample at step %d: %s", session.state.step, text)
