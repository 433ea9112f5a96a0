import pytest

from gptopt.config import DataOptions, TokenizeOptions
from gptopt.data import open_dataset, tokenize


@pytest.fixture
def make(tmp_path):
    """Tokenise inputs with options; the opened data folder and the verb's summary."""

    def run(*inputs, out="data", **options):
        options = TokenizeOptions(
            inputs=[str(path) for path in inputs],
            out=str(tmp_path / out),
            **{"kind": "char", "json": True, **options},
        )
        summary = tokenize(options)
        return open_dataset([str(tmp_path / out)], DataOptions()), summary

    return run
