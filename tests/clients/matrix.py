"""Every row of tests/clients_matrix.toml in every client; run by `make test-clients`.

The name keeps it out of `make test`: it needs what `make clients` installs.
"""

import os
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptopt.export.clients import CLIENTS, check_clients, client_table, find_clients
from gptopt.export.clients.registry import WEBGPU
from gptopt.export.package import Plan, export_model
from gptopt.export.targets import TARGETS
from gptopt.precisions import find_precisions
from gptopt.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from random_models import random_gpt

TESTS = Path(__file__).parents[1]
ROWS = tomllib.loads((TESTS / "clients_matrix.toml").read_text(encoding="utf-8"))
PICTURES = os.environ.get("GPTOPT_PICTURES")
QUICK, LONG = 48, 256


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on texts that lie here, so that its ids are mostly whole words."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(TESTS.glob("*.py"))]
    return Tokenizer.train(texts, vocab_size=1024)


@pytest.fixture(scope="session")
def exported(tokenizer, tmp_path_factory):
    """(folder, model) of a row; each is exported once."""
    torch.set_num_threads(1)
    made = {}

    def make(name):
        if name not in made:
            row = ROWS[name]
            model = random_gpt(**{"block_size": 288, "vocab_size": 1024, **row["config"]})
            folder = tmp_path_factory.mktemp("exported") / name
            target = TARGETS[row.get("target", "portable")]
            if row.get("external"):
                target = replace(target, inline_limit_bytes=0)
            plan = Plan(find_precisions(row.get("precision", "fp32")))
            export_model(model, tokenizer, folder, target=target, plan=plan)
            made[name] = folder, model
        return made[name]

    return make


ASKED = {client.name for client in find_clients("all")} | set(WEBGPU)


@pytest.mark.parametrize(
    ("name", "client"),
    [(name, client) for name, row in ROWS.items() for client in row if client in ASKED],
)
def test_clients_say_what_the_model_says(name, client, exported):
    row = ROWS[name]
    folder, model = exported(name)
    said = check_clients(
        folder, model, [CLIENTS[client]], tokens=LONG if row.get("long") else QUICK,
        pictures=None if PICTURES is None else Path(PICTURES),
    )  # fmt: skip
    found = {
        each.case: "pass" if each.passed else each.limit.name if each.limit else each.error
        for each in said
    }
    assert found == row[client], client_table(said)
    for each in said:
        if row.get("long") and each.case == "greedy" and each.passed:
            assert each.tokens == LONG, "the text ended early, and says too little"
            assert each.distinct >= 64
