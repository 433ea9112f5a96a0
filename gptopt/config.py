"""Every option a user can set, with its range and its meaning: flags, TOML keys and defaults alike.

Imports no torch, so that `--help` is instant. Sizes have the letters of CONTRIBUTING: C = n_embd
channels, H = n_head query heads, K = n_kv_head key/value heads, D = head_dim, F = n_inner, V =
vocab_size.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptopt.presets import PRESETS as PRESETS

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"]
GATED_ACTIVATIONS: frozenset[str] = frozenset({"swiglu", "geglu"})
MAX_SIZE = 2**24  # no real model is near it; larger numbers are typing errors, not sizes

Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    """Base of every group of options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Options):
    """The shape of a GPT. Nothing in here says how it is run."""

    n_layer: int = Field(12, gt=0, le=4096, description="number of blocks")
    n_head: Size = Field(12, description="number of query heads")
    n_kv_head: Size | None = Field(
        None,
        description="number of key/value heads: fewer than n_head is GQA, 1 is MQA (none: n_head)",
    )
    n_embd: Size = Field(768, description="channels of the residual stream")
    n_inner: Size | None = Field(
        None, description="width of the ffn (none: 4 n_embd; gated: 8/3 n_embd rounded up to 64)"
    )
    head_dim: Size | None = Field(None, description="channels per head (none: n_embd / n_head)")
    block_size: Size = Field(1024, description="longest context in tokens")
    vocab_size: Size | None = Field(
        None, description="rows of the embedding (none: the tokenizer's size rounded up to 64)"
    )
    dropout: Fraction = Field(0.0, description="dropout probability, used while training")
    bias: bool = Field(True, description="biases in linear layers and layernorms")
    qkv_bias: bool | None = Field(
        None, description="biases of the query, key and value projections (none: as bias)"
    )
    activation: Activation = Field("gelu_tanh", description="activation of the ffn")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="kind of norm")
    norm_position: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="norms before each sub-layer, after the residual sum, or on both sides"
    )
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="epsilon inside the norms")
    position: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = Field(
        "learned", description="how the model knows the order of tokens"
    )
    rotary_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies (theta)")
    rotary_interleaved: bool = Field(
        False, description="rotary pairs channels (2i, 2i+1) instead of (i, i + D/2)"
    )
    window: Size | None = Field(
        None, description="sliding attention window in tokens, the token itself included"
    )
    attn_softcap: float | None = Field(None, gt=0, description="tanh cap on attention scores")
    logit_softcap: float | None = Field(None, gt=0, description="tanh cap on the logits")
    qk_norm: bool = Field(False, description="rmsnorm on each head's queries and keys")
    tie_head: bool = Field(True, description="the head shares the token embedding's weights")
    causal: bool = Field(True, description="next-token model; false: bidirectional (masked LM)")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"choose a multiple, or set head_dim"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {self.head_size}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, found {self.n_embd}")
        if self.window is not None and not self.causal:
            raise ValueError("a sliding window needs causal attention")
        return self

    @property
    def kv_heads(self) -> int:
        """K: key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """D: channels per head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def biased_qkv(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def gated(self) -> bool:
        """Whether the ffn has a gate branch."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def ffn_width(self) -> int:
        """F: width of the ffn."""
        if self.n_inner is not None:
            return self.n_inner
        return -(-8 * self.n_embd // 3 // 64) * 64 if self.gated else 4 * self.n_embd


class DataOptions(Options):
    """How text becomes tokens, where INPUT is not tokenised yet."""

    kind: Literal["bpe", "char", "word"] = Field("bpe", description="kind of tokenizer to train")
    vocab_size: Size = Field(8192, description="largest vocabulary that bpe and word may learn")
    tokenizer: str | None = Field(None, description="folder or tokenizer.json to use as it is")
    mask_token: bool = Field(False, description="give a new vocabulary a <mask> token")
    val_fraction: Fraction = Field(0.1, description="share held out for validation")
    text_field: str = Field("text", description="field that holds the text in jsonl and parquet")


class TokenizeOptions(DataOptions):
    """Turn text into a folder of token shards and a tokenizer."""

    inputs: list[str] = Field(description="text, jsonl or parquet files, or folders of them")
    out: str = Field(description="data folder to write")
    force: bool = Field(False, description="replace the folder if it exists")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class LoraOptions(Options):
    """A low-rank adapter, trained in place of the model's own weights."""

    rank: int = Field(
        0, ge=0, le=MAX_SIZE, description="rank of the adapter (0: train all weights)"
    )
    alpha: float | None = Field(
        None, gt=0, description="the adapter counts alpha / rank times (none: 2 rank)"
    )
    dropout: Fraction = Field(0.0, description="dropout of what enters the adapter")
    targets: str = Field(
        "attention",
        description="layers to adapt, comma-separated: attention, ffn, or names as transformers "
        "has them, such as q_proj, or c_attn in a GPT-2",
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class DistillOptions(Options):
    """Learning from a larger model besides the text."""

    teacher: str | None = Field(
        None, description="model, run or Hugging Face folder to learn from (none: the text alone)"
    )
    temperature: float = Field(1.0, gt=0, description="how much both distributions are flattened")
    weight: float = Field(
        0.9, gt=0, le=1, description="weight of the teacher's word; the rest is the text's"
    )


class LoopOptions(Options):
    """What every verb that trains has in common: the run, the update rule, its rhythm."""

    out: str = Field(description="run folder to write")
    resume: bool = Field(
        False, description="continue the run (start it where none exists; done where complete)"
    )
    exact: bool = Field(
        False, description="with --resume: refuse what would change the last bits of the numbers"
    )
    dry_run: bool = Field(
        False, description="say what the run would hold in memory and how long it takes, no more"
    )
    init_from: str | None = Field(None, description="model whose weights to start from")
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="which operator bodies run"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="autocast precision (auto: bfloat16 on a GPU that has it, else float32)"
    )
    compile: bool = Field(False, description="torch.compile the model")
    cuda_graph: bool = Field(False, description="record a GPU's whole step once, and replay it")
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="under torchrun: whole models (ddp) or a part of one on each rank (fsdp); auto"
        " is ddp",
    )
    activation_checkpointing: bool = Field(
        False, description="compute each block twice instead of keeping what is inside it"
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="how long ranks wait for each other before the job ends"
    )
    steps: int = Field(0, ge=0, description="optimiser steps in all (0: what the epochs take)")
    max_seconds: float | None = Field(
        None, gt=0, description="end the schedule and the run after this much training time"
    )
    batch_size: Size = Field(16, description="sequences per micro-batch (of each rank)")
    accumulate: Size = Field(1, description="micro-batches per optimiser step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-4, ge=0, description="learning rate at the end of the schedule")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape of the learning rate after the warm-up"
    )
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw", description="update rule (muon: of the blocks' matrices; the rest keeps adamw)"
    )
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices and embeddings")
    beta1: Fraction = Field(0.9, description="AdamW beta1")
    beta2: Fraction = Field(0.95, description="AdamW beta2")
    momentum: Fraction = Field(0.95, description="Muon momentum")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm (0: no clipping)")
    label_smoothing: Fraction = Field(0.0, description="label smoothing of the loss")
    eval_every: int = Field(250, ge=0, description="steps between evaluations (0: only at the end)")
    eval_batches: int = Field(
        50, ge=0, description="micro-batches per evaluation (0: the whole validation split)"
    )
    checkpoint_every: int = Field(
        500,
        ge=0,
        description="steps between checkpoints (0: only at evaluations' best and the end)",
    )
    keep_checkpoints: Size = Field(2, description="checkpoints kept beside the best one")
    keep_every: int = Field(
        0, ge=0, description="checkpoints of every so many steps are kept for good (0: none)"
    )
    sync_save: bool = Field(
        False, description="train on only when a checkpoint is on the disk (saves host memory)"
    )
    sample_every: int = Field(0, ge=0, description="steps between printed samples (0: none)")
    log_every: Size = Field(10, description="steps between lines of metrics.jsonl")
    max_skips: int = Field(0, ge=0, description="steps with gradients that are not finite to skip")
    seed: int = Field(1337, ge=0, lt=2**63, description="seed of weights, data order and dropout")
    qat: str | None = Field(
        None, description="train for an export in this precision, such as q4: its rounding is felt"
    )
    lora: LoraOptions = Field(default_factory=LoraOptions, description="a LoRA adapter")
    track: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="tell tensorboard, wandb or trackio what metrics.jsonl says; repeat for more",
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.qat is not None and self.lora.rank:
            raise ValueError("--qat rounds the weights that --lora.rank freezes; leave one out")
        return self


class TrainOptions(LoopOptions):
    """Train a GPT. What was set is printed, and all of it is saved in the run folder."""

    inputs: list[str] = Field(description="a data folder, or text, jsonl or parquet")
    preset: str | None = Field(None, description="named shape to start from")
    mix: str | None = Field(
        None, description="weights of several data folders, such as 0.7,0.3 (none: by their sizes)"
    )
    objective: Literal["next", "masked"] = Field(
        "next", description="predict the next token, or hidden ones from both sides (masked LM)"
    )
    mask_rate: Fraction = Field(0.15, gt=0, description="of masked: share of tokens to predict")
    steps: Size = Field(2000, description="optimiser steps in all")
    z_loss: float = Field(0.0, ge=0, description="weight of the z-loss")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model")
    data: DataOptions = Field(default_factory=DataOptions, description="tokenising INPUT")
    distill: DistillOptions = Field(
        default_factory=DistillOptions, description="learning from a larger model"
    )

    @model_validator(mode="after")
    def _teacher_fits(self) -> Self:
        if self.distill.teacher is None:
            if self.distill != DistillOptions():
                raise ValueError("--distill.temperature and --distill.weight need a teacher")
        elif self.objective != "next":
            raise ValueError("--distill.teacher teaches next tokens; leave --objective out")
        elif self.z_loss:
            raise ValueError("--distill.teacher knows no --z-loss; leave one of them out")
        return self


class PlotOptions(Options):
    """Draw what runs logged into one picture: loss, learning rate, gradients, speed, memory."""

    runs: list[str] = Field(description="run folders")
    out: str = Field("runs.png", description="picture to write: .png, .svg or .pdf")
    x: Literal["step", "tokens", "seconds"] = Field("step", description="what runs along the axis")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class SamplingOptions(Options):
    """How the next token is chosen."""

    max_new_tokens: Size = Field(100, description="tokens to generate at most")
    temperature: float = Field(0.8, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample from the K likeliest tokens only (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest P of the mass")
    min_p: Fraction = Field(0.0, description="drop tokens below P times the likeliest one")
    repetition_penalty: float = Field(1.0, gt=0, description="divide the score of seen tokens")
    stop: list[str] = Field(default_factory=list, description="text that ends the generation")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampling")


class GenerateOptions(SamplingOptions):
    """Continue a prompt with a PyTorch model."""

    model: str = Field(description="model, run, adapter or Hugging Face folder, or hf:org/name")
    adapter: str | None = Field(None, description="LoRA adapter or its run, to put on the model")
    prompt: list[str] = Field(description="text to continue; repeat the flag for a batch")
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    context: Literal["error", "slide"] = Field(
        "error", description="at the context edge: stop with an error, or drop the oldest tokens"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto")
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="which operator bodies run"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class EvaluateOptions(Options):
    """Loss and perplexity of a model, or of an exported folder, on text."""

    model: str = Field(
        description="model, run, adapter, Hugging Face or exported folder, or hf:org/name"
    )
    adapter: str | None = Field(
        None, description="LoRA adapter to put on the model; of an exported folder: its name there"
    )
    data: list[str] = Field(
        default_factory=list, description="a data folder, or text, jsonl or parquet"
    )
    choices: str | None = Field(
        None, description="instead: jsonl of questions, each with prompt, choices and answer"
    )
    split: Literal["auto", "train", "val"] = Field(
        "auto", description="part of a data folder (auto: val where there is one)"
    )
    checkpoint: str = Field("auto", description="of a run: best, last, or a step number")
    text_field: str = Field("text", description="field that holds the text in jsonl and parquet")
    label_field: str = Field("label", description="of a classifier: field of the true labels")
    batch_size: Size = Field(16, description="sequences per batch")
    max_tokens: int = Field(0, ge=0, description="tokens to score at most (0: all)")
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto")
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="which operator bodies run"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if bool(self.data) == bool(self.choices):
            raise ValueError("give the text to score with --data, or questions with --choices")
        return self


class RunOptions(SamplingOptions):
    """Continue a prompt with an exported folder: onnxruntime, no PyTorch."""

    folder: str = Field(description="exported folder")
    prompt: list[str] = Field(default_factory=list, description="text to continue")
    context: Literal["error", "slide"] = Field(
        "error", description="at the context edge: stop with an error, or drop the oldest tokens"
    )
    provider: str = Field("cpu", description="onnxruntime execution provider, such as cpu or cuda")
    precision: str = Field("auto", description="which file runs, such as q4 (auto: the first)")
    adapter: str | None = Field(None, description="which of the folder's LoRA adapters is on")
    threads: int = Field(
        0, ge=0, description="threads of onnxruntime (0: as tuned, else one per core)"
    )
    tune: bool = Field(
        False, description="measure which threads are fastest here, and keep it for this machine"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")


class DemoOptions(Options):
    """The main job from text to the edge, offline, in minutes."""

    out: str = Field("demo", description="folder for everything the demo writes")
    seconds: float = Field(120.0, gt=0, description="training time in seconds")
    force: bool = Field(False, description="replace the folder if it exists")
    json_output: bool = Field(False, alias="json", description="print one JSON object on stdout")
