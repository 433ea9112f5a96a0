"""`gptopt chat --adapter`: a LoRA adapter talks, on a model folder and on an exported one."""

import copy
import io

import pytest
import torch

from gptopt.chat import chat
from gptopt.checkpoint import load_model, save_model
from gptopt.config import LoraOptions
from gptopt.config_chat import ChatOptions
from gptopt.config_export import ExportOptions
from gptopt.errors import UserError
from gptopt.export.verbs import export
from gptopt.lora import begin, lora_parameters

TEXT = "user: the cat sat on the mat\nassistant: and the dog ran to the door " * 20


@pytest.fixture(scope="module")
def folders(make_reading_model, tmp_path_factory):
    """A folder with a base, its adapter, and both exported as one folder."""
    root = tmp_path_factory.mktemp("adapter")
    model, tokenizer = make_reading_model(TEXT, vocab_size=320, block_size=64)
    for name in ("base", "tuned"):
        (root / name).mkdir()
    save_model(root / "base", model, tokenizer)
    start = load_model(root / "base").model
    tuned = begin(copy.deepcopy(start), LoraOptions(rank=2), start, root / "base")
    with torch.no_grad():
        for parameter in lora_parameters(tuned):
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    save_model(root / "tuned", tuned, None)
    options = {"model": str(root / "base"), "adapter": f"kind={root / 'tuned'}"}
    export(ExportOptions(**options, out=str(root / "edge"), json=True))
    return root


@pytest.fixture
def replies(folders, monkeypatch):
    """What a model says to two messages, greedily."""

    def talk(model, adapter=None):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nthe mat\n"))
        options = ChatOptions(
            model=str(folders / model), adapter=adapter, temperature=0, max_new_tokens=6, json=True
        )
        return [each["content"] for each in chat(options)["messages"] if each["role"] != "user"]

    return talk


def test_an_adapter_talks_alike_in_every_place(folders, replies):
    base, tuned = replies("base"), replies("base", str(folders / "tuned"))
    assert base != tuned
    assert replies("tuned") == tuned  # the adapter's folder stands for its base with it on
    assert replies("edge") == base
    assert replies("edge", "kind") == tuned


@pytest.mark.parametrize(
    ("model", "adapter", "named"),
    [
        ("edge", "cruel", "has no adapter 'cruel'; it has kind"),
        ("base", "base", "holds a whole model, no adapter"),
        ("base", "nowhere", "no such folder"),
    ],
)
def test_an_adapter_that_is_not_there_is_one_line(folders, replies, model, adapter, named):
    with pytest.raises(UserError, match=named):
        replies(model, adapter if model == "edge" else str(folders / adapter))
