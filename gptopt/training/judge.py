"""Validation loss and samples while training; neither draws from the run's random numbers."""

import logging
import math

from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.evaluate import evaluate_split
from gptopt.generate import generate_text
from gptopt.manifest import write_text
from gptopt.training.session import Session

logger = logging.getLogger(__name__)

SAMPLES = "samples"
_PROMPT_TOKENS = 8
_SAMPLING = SamplingOptions(max_new_tokens=100, temperature=0.8, seed=0)


def evaluate(session: Session) -> float | None:
    """Mean loss per token on the validation split in nats, None where nothing was held out."""
    split, options = session.dataset.val, session.options
    if len(split) < 2:
        return None
    with session.precision():
        loss, _ = evaluate_split(
            session.model,
            split,
            block_size=session.model.config.block_size,
            batch_size=options.batch_size,
            max_batches=options.eval_batches,
        )
    if math.isfinite(loss):
        return loss
    logger.warning("step %d: the validation loss is %s", session.state.step, loss)
    return None


def sample(session: Session) -> None:
    """Continue the beginning of the validation text; into RUN/samples and onto the screen."""
    tokenizer = session.dataset.tokenizer
    text = session.dataset.val if len(session.dataset.val) else session.dataset.train
    prompt = tokenizer.decode(text.read(0, min(_PROMPT_TOKENS, len(text))).tolist())
    try:
        continued = generate_text(session.model, tokenizer, prompt, _SAMPLING)
    except UserError as error:
        logger.warning("no sample at step %d: %s", session.state.step, error)
        return
    folder = session.out / SAMPLES
    folder.mkdir(exist_ok=True)
    write_text(folder / f"step-{session.state.step:06d}.txt", prompt + continued + "\n")
    logger.info("sample at step %d: %s", session.state.step, prompt + continued)
