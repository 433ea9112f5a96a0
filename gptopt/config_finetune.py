"""Options of the verbs that fine-tune: they start from a model and learn from examples."""

from typing import Literal

from pydantic import Field

from gptopt.config import Fraction, LoopOptions, Size

Overlong = Literal["error", "drop", "cut-start", "cut-end"]


class FinetuneOptions(LoopOptions):
    """What all of them have in common."""

    inputs: list[str] = Field(description="jsonl or parquet files of examples")
    init_from: str = Field(description="model, run or Hugging Face folder to start from")
    val_data: list[str] = Field(
        default_factory=list, description="files of examples to validate on; repeat for more"
    )
    val_fraction: Fraction = Field(
        0.1, description="share of the examples held out for validation, without --val-data"
    )
    epochs: Size = Field(3, description="times to go through the examples")
    block_size: Size | None = Field(
        None, description="tokens of a sequence (none: as many as the model sees)"
    )
    overlong: Overlong = Field(
        "error", description="examples of more tokens: stop, leave out, or cut at one end"
    )
    parse_control: bool = Field(
        False, description="take control tokens inside the text as what they name"
    )
    dropout: Fraction | None = Field(
        None, description="dropout while training (none: as the model was trained)"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decay of matrices and embeddings")
    eval_every: int = Field(50, ge=0, description="steps between evaluations (0: only at the end)")
    eval_batches: int = Field(
        0, ge=0, description="batches per evaluation (0: everything that is held out)"
    )


class SftOptions(FinetuneOptions):
    """Teach a model to reply: prompts with completions, or conversations."""

    prompt_field: str = Field("prompt", description="field of the text to reply to")
    completion_field: str = Field("completion", description="field of the reply")
    messages_field: str = Field(
        "messages", description="field of a conversation: a list of objects of role and content"
    )
    chat_template: str | None = Field(
        None, description="Jinja file that spells conversations (none: the tokenizer's, or plain)"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of the z-loss")


class ClassifyOptions(FinetuneOptions):
    """Teach a model to label text: one label for each, or any number with --multi-label."""

    text_field: str = Field("text", description="field of the text")
    label_field: str = Field("label", description="field of the label, or of a list of labels")
    multi_label: bool = Field(False, description="a text may have several labels, or none")
    pooling: Literal["auto", "last", "mean"] = Field(
        "auto",
        description="what is labelled: the last token's vector, or the mean of all (auto: last "
        "for a next-token model, mean for a masked one)",
    )
    labels: list[str] = Field(
        default_factory=list,
        description="a label; repeat for more, in order (none: those of the examples, sorted)",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare labels count as much as frequent ones"
    )
