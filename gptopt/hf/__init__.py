"""Hugging Face's names for what gptopt has; they live here and nowhere else.

A configuration that none of the known architectures expresses is written as model_type "gptopt",
with our own names for its weights.
"""

from gptopt.hf.architectures import ARCHITECTURES
from gptopt.hf.config import (
    OWN,
    architecture_of,
    config_from_json,
    config_to_json,
    obstacles,
)
from gptopt.hf.weights import HEAD, SCORE, Weight, plain_names, stored_name, weights

__all__ = [
    "ARCHITECTURES",
    "HEAD",
    "OWN",
    "SCORE",
    "Weight",
    "architecture_of",
    "config_from_json",
    "config_to_json",
    "obstacles",
    "plain_names",
    "stored_name",
    "weights",
]
