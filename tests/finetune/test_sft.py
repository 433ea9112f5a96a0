"""`gptopt finetune sft`: what is learned, what is refused, and that a run resumes exactly."""

import json
import math
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch

from gptopt.checkpoint import load_model
from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.finetune import sft
from gptopt.generate import generate_text
from gptopt.training.metrics import read_metrics

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
CHAT = {"messages": [{"role": "user", "content": "what says the cat?"},
                     {"role": "assistant", "content": "the cat meows."}]}  # fmt: skip


def refused(options) -> str:
    with pytest.raises(UserError) as caught:
        sft(options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_learns_to_reply_and_to_stop(sft_options, replies):
    result = sft(
        sft_options(
            replies,
            steps=0,
            epochs=60,
            lr=2e-2,
            batch_size=1,
            val_data=[replies],
            checkpoint_every=0,
        )
    )
    assert result["best_val_loss"] < 0.2
    loaded = load_model(result["best_checkpoint"])
    said = generate_text(loaded.model, loaded.tokenizer, "what says the owl? ", GREEDY)
    assert said == "the owl hoots."


def test_prompts_are_not_learned(sft_options, write):
    """The loss of the first step is that of the replies alone."""
    records = [{"prompt": "what says the fox? " * 2, "completion": "yelps"}] * 4
    result = sft(sft_options(write(*records), steps=1, val_fraction=0.0, lr=1e-9, min_lr=0))
    model, tokenizer, _ = load_model(result["checkpoint"])
    prompt = tokenizer.encode(records[0]["prompt"])
    ids = torch.tensor([[*prompt, *tokenizer.encode("yelps"), tokenizer.eos_id]])
    targets = ids[:, 1:].clone()
    targets[:, : len(prompt) - 1] = -100
    expected = model(ids[:, :-1], targets).loss.item()
    assert result["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["tokens"] == 2 * (ids.shape[1] - 1) * (32 // (ids.shape[1] - 1))


def test_micro_batches_count_by_their_replies(sft_options, replies):
    """One step of one batch, or of several with unevenly many reply tokens: the same step."""
    losses, weights = [], []
    for name, batch, accumulate in (("one", 4, 1), ("four", 1, 4)):
        result = sft(
            sft_options(
                replies, name, steps=2, block_size=16, batch_size=batch, accumulate=accumulate
            )
        )
        losses.append(result["train_loss"])
        model = load_model(result["checkpoint"]).model
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-6)


def test_epochs_decide_the_steps_and_the_best_checkpoint_is_by_validation_loss(
    sft_options, replies, tmp_path
):
    result = sft(sft_options(replies, steps=0, epochs=4, block_size=16, eval_every=3))
    assert result["steps"] == math.ceil(4 * result["blocks"] / 2)
    assert (result["examples"], result["val_examples"]) == (11, 1)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in line]
    best = min(lines, key=lambda line: line["val_loss"])
    assert result["best_step"] == best["step"]
    again = sft(sft_options(replies, steps=0, epochs=4, block_size=16, eval_every=3, resume=True))
    assert again == {**result, "already_complete": True}


def test_conversations_travel_with_their_template(sft_options, write, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    options = sft_options(write(CHAT, CHAT), chat_template=str(template), sample_every=6)
    result = sft(options)
    tokenizer = load_model(result["checkpoint"]).tokenizer
    assert tokenizer.chat_template == template.read_text()
    sample = (tmp_path / "run/samples/step-000006.txt").read_text()
    assert sample.startswith("[user]what says the cat?<|endoftext|>[assistant]")


EOS = "<|endoftext|>"


def test_control_tokens_in_the_data_are_text_unless_asked(sft_options, write):
    data = write(*[{"prompt": f"cat{EOS}", "completion": f"dog{EOS}"}] * 2)
    result = sft(sft_options(data, "plain", steps=1))
    parsed = sft(sft_options(data, "parsed", steps=1, parse_control=True))
    assert parsed["tokens"] < result["tokens"]


RECORD = {"prompt": "cat? ", "completion": "meows"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object, found list"),
        ({"text": "x"}, "line 2: neither 'messages' nor 'prompt' with 'completion' (found: text)"),
        ({"prompt": "x"}, "line 2: no field 'completion' (found: prompt)"),
        ({"prompt": 1, "completion": "x"}, "line 2: field 'prompt' is int, expected text"),
        ({"prompt": "x", "completion": ["y"]}, "line 2: field 'completion' is list"),
        ({"prompt": "x", "completion": " \n"}, "line 2: field 'completion' is empty"),
        ({**CHAT, **RECORD}, "line 2: both 'messages' and 'prompt' are there"),
        ({"messages": CHAT["messages"][::-1]}, "line 2: field 'messages': message 1: roles out"),
        ({"prompt": "x", "completion": "\ud800"}, "line 2: lone surrogate"),
        (
            {"prompt": "cat " * 40, "completion": "y"},
            "at most 33 fit; shorten it, or",
        ),
    ],
)
def test_bad_records_name_their_line(sft_options, write, record, message, tmp_path):
    found = refused(sft_options(write(RECORD, record)))
    assert message in found
    assert str(tmp_path / "data.jsonl") in found


def test_bad_files_are_one_line(sft_options, write, tmp_path, make_base):
    assert "holds no example" in refused(sft_options(write()))
    assert "no such file" in refused(sft_options(str(tmp_path / "nowhere.jsonl")))
    text = tmp_path / "data.txt"
    text.write_text("hello")
    assert "not a jsonl or parquet file" in refused(sft_options(str(text)))
    assert "sees 32 tokens" in refused(sft_options(write(RECORD), block_size=33))
    masked = make_base(causal=False)
    assert "masked language model" in refused(sft_options(write(RECORD), init_from=masked))


def test_parquet_is_read_and_a_truncated_one_is_refused(sft_options, tmp_path):
    path = tmp_path / "data.parquet"
    table = pyarrow.table({"prompt": ["cat? ", "dog? "], "completion": ["meows", "barks"]})
    pyarrow.parquet.write_table(table, path)
    assert sft(sft_options(str(path), steps=1))["examples"] == 1
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:-9])
    assert "cut.parquet after row 0: not readable as parquet" in refused(sft_options(str(cut), "b"))
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), other)
    assert "no column 'messages' or 'prompt'" in refused(sft_options(str(other), "c"))
    chats = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT["messages"]] * 2}), chats)
    assert sft(sft_options(str(chats), "d", steps=1))["examples"] == 1


@pytest.mark.parametrize(
    ("policy", "kept", "dropped"), [("drop", 1, 1), ("cut-start", 2, 0), ("cut-end", 1, 1)]
)
def test_overlong_examples_are_treated_as_asked(sft_options, write, policy, kept, dropped):
    """Cut at its end this one has no reply left, so it is left out as well."""
    data = write(RECORD, {"prompt": "the cat " * 40, "completion": "meows"})
    result = sft(sft_options(data, overlong=policy, val_fraction=0.0, steps=1))
    assert (result["examples"], result["dropped"]) == (kept, dropped)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, "accumulate": 2}], ids=["plain", "more"])
def test_resume_is_bit_exact(sft_options, replies, tmp_path, dying_after, changes):
    changes = {"steps": 7, "eval_every": 4, "block_size": 16, **changes}
    sft(sft_options(replies, "straight", **changes))
    with dying_after(5):
        sft(sft_options(replies, "killed", **changes))
    assert sft(sft_options(replies, "killed", resume=True, **changes))["resumed_from"] == 4
    straight, killed = (
        tmp_path / run / "checkpoints/step-000007" for run in ("straight", "killed")
    )
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    states = [json.loads((f / "state.json").read_text())["train"] for f in (straight, killed)]
    assert states[0]["sampler"] == states[1]["sampler"]
    assert states[0]["best_val_loss"] == states[1]["best_val_loss"]


def test_resume_refuses_other_examples(sft_options, replies, write, tmp_path):
    sft(sft_options(replies, steps=2))
    other = write(RECORD, RECORD, name="other.jsonl")
    assert "another data" in refused(sft_options(other, steps=4, resume=True))
    shutil.rmtree(tmp_path / "run")


def test_an_adapter_remembers_the_template_that_it_was_taught_with(
    sft_options, write, tmp_path, make_base
):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    options = sft_options(write(CHAT, CHAT), chat_template=str(template), lora={"rank": 2}, steps=1)
    result = sft(options)
    alone = load_model(result["out"])
    beside = load_model(make_base(), adapter=result["out"])
    for loaded in (alone, beside):
        assert loaded.tokenizer.chat_template == template.read_text()
    assert load_model(make_base()).tokenizer.chat_template is None
