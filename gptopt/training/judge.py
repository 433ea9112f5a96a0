"""Validation loss and samples while training; neither draws from the run's random numbers."""

import logging

from gptopt.training.session import Session

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 100
SAMPLE_TEMPERATURE = 0.8


def evaluate(session: Session) -> float | None:
    """Mean loss per token on the validation split in nats, None where nothing was held out."""
    raise NotImplementedError


def sample(session: Session) -> None:
    """Write a sample to RUN/samples and show it."""
    raise NotImplementedError
