"""A small random GPT, as a model folder and as the folder exported from it."""

from pathlib import Path

import pytest
import torch

from gptopt.checkpoint import save_model
from gptopt.config import ModelConfig
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. \N{FOX FACE} na\u00efve caf\u00e9!\n" * 4


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], kind="bpe", vocab_size=300)


def random_gpt(**sizes):
    """Weights large enough that greedy tokens vary with every block, position and cache entry."""
    torch.manual_seed(1)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 320}
    model = GPT(ModelConfig(**{**values, "tie_head": False, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        model.wte.weight.normal_()
    return model.eval()


def reading_gpt(text, *, vocab_size, block_size, spare=0):
    """(random model, tokenizer of the text); the model has `spare` ids more than the tokenizer."""
    torch.manual_seed(3)
    tokenizer = Tokenizer.train([text], vocab_size=vocab_size)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": block_size}
    model = GPT(ModelConfig(**sizes, vocab_size=tokenizer.size + spare)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, tokenizer


@pytest.fixture(scope="session")
def make_model():
    return random_gpt


@pytest.fixture(scope="session")
def make_reading_model():
    return reading_gpt


@pytest.fixture(scope="session")
def make_folders(tmp_path_factory):
    """make_folders(model, tokenizer): (model folder, exported folder)."""
    from gptopt.export.package import export_model

    def make(model, tokenizer):
        made = tmp_path_factory.mktemp("folders")
        (made / "model").mkdir()
        save_model(made / "model", model, tokenizer)
        export_model(model, tokenizer, made / "edge", force=False)
        return str(made / "model"), str(made / "edge")

    return make


@pytest.fixture(scope="session")
def model():
    return random_gpt()


@pytest.fixture(scope="session")
def model_folder(model, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def edge_folder(model, tokenizer, tmp_path_factory) -> Path:
    from gptopt.export import export_model

    folder = tmp_path_factory.mktemp("edge") / "edge"
    export_model(model, tokenizer, folder)
    return folder
