"""Which documents validate: the same ones whatever is held in memory to find them."""

import numpy as np
import pytest

from gptopt.data import splitting
from gptopt.data.sampler import shuffled
from gptopt.data.splitting import Plan


@pytest.mark.parametrize("documents", [2, 3, 10, 1000, 70_001])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 0.999999])
def test_those_that_validate_are_the_last_of_a_shuffle(monkeypatch, documents, fraction):
    monkeypatch.setattr(splitting, "_WORDS_AT_ONCE", 4096)
    count = min(max(1, round(fraction * documents)), documents - 1)
    expected = np.zeros(documents, dtype=bool)
    expected[shuffled(documents, 0)[-count:]] = True
    plan = Plan.make(files=2, documents=documents, characters=1, fraction=fraction)
    assert np.array_equal(plan.validates, expected)


def test_of_one_file_the_last_documents_validate():
    plan = Plan.make(files=1, documents=10, characters=1, fraction=0.3)
    assert plan.validates.tolist() == [False] * 7 + [True] * 3
