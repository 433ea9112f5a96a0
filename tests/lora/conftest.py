"""Folders of tiny adapters and their bases."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from lora_models import tiny, trained

from gptopt.checkpoint import save_model
from gptopt.config import LoraOptions
from gptopt.lora import begin
from gptopt.manifest import staged_folder


@pytest.fixture
def saved(tmp_path):
    """Write a base and an adapter on it; their folders, and the model with the adapter."""

    def write(shape="gpt2", name="adapter", seed=1, rank=3, **options):
        base = tmp_path / "base"
        if not base.exists():
            with staged_folder(base) as folder:
                save_model(folder, tiny(shape), None)
        start = tiny(shape)
        model = begin(tiny(shape), LoraOptions(rank=rank, **options), start, base).eval()
        trained(model, seed)
        with staged_folder(tmp_path / name) as folder:
            save_model(folder, model, None)
        return base, tmp_path / name, model

    return write


@pytest.fixture
def ids():
    """Two texts of eleven tokens."""
    return torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(3))
