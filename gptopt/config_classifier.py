"""The shape of a model that labels text: that of a GPT, and its labels."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gptopt.config import MAX_SIZE, ModelConfig, Options


class Labelling(Options):
    """The labels of a text, and how they are read off the model's vectors."""

    labels: list[str] = Field(
        min_length=1, max_length=MAX_SIZE, description="names of the labels, in their order"
    )
    multi_label: bool = Field(False, description="a text may have several labels, or none")
    pooling: Literal["last", "mean"] = Field(
        "last", description="the vector that is labelled: of the last token, or the mean of all"
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise ValueError(f"the label {twice!r} is there twice")
        return self

    def of(self, config: ModelConfig) -> "ClassifierConfig":
        """The shape of the model that labels, on the trunk of another one."""
        # A head of its own is not taken over: what it knew were tokens.
        shape = {name: getattr(config, name) for name in ModelConfig.model_fields}
        return ClassifierConfig(**(shape | {"tie_head": True} | self.model_dump()))


class ClassifierConfig(Labelling, ModelConfig):
    """A GPT whose head gives a score to each label instead of each token."""


def model_config_of(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration of whichever kind of model these values describe."""
    kind = ClassifierConfig if "labels" in values else ModelConfig
    return kind.model_validate(values)


def says_next(config: ModelConfig) -> bool:
    """Whether a model predicts next tokens, and so has a cache and can write."""
    return config.causal and labels_of(config) is None


def labels_of(config: ModelConfig) -> list[str] | None:
    """The labels of a model that labels text; None for one that predicts tokens."""
    return config.labels if isinstance(config, ClassifierConfig) else None
