"""Options of `gptopt chat`."""

from pydantic import Field

from gptopt.config import SamplingOptions, Size


class ChatOptions(SamplingOptions):
    """Talk with a model, in the terminal or line by line from a pipe."""

    model: str = Field(
        description="model, run, adapter, Hugging Face or exported folder, or hf:org/name"
    )
    adapter: str | None = Field(
        None, description="LoRA adapter to put on the model; of an exported folder: its name there"
    )
    system: str | None = Field(None, description="what the model is told before the conversation")
    chat_template: str | None = Field(
        None, description="Jinja file that spells conversations (none: the tokenizer's, or plain)"
    )
    max_new_tokens: Size = Field(256, description="tokens of a reply at most")
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    device: str = Field(
        "auto", description="cpu, cuda, cuda:N, mps; of an exported folder its provider"
    )
    precision: str = Field(
        "auto", description="of an exported folder: which file runs, such as q4 (auto: the first)"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")
