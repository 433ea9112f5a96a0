import pytest

from gptopt.tokenizer import Tokenizer

TEXT = (
    "The cat sat on the mat, and the dog sat on the log.\n\n"
    "It's the cat's mat; isn't it?  The caf\u00e9 na\u00efvely costs 42 \u20ac.\r\n"
    "\tdef cat(dog):\n\t\treturn dog + 1\n\u4e2d\u6587 \U0001f600\n"
) * 4


@pytest.fixture(scope="session")
def text():
    return TEXT


@pytest.fixture(scope="session")
def trained():
    return {
        kind: Tokenizer.train([TEXT], kind=kind, vocab_size=320) for kind in ("bpe", "word", "char")
    }


@pytest.fixture(scope="session", params=["bpe", "word", "char"])
def tokenizer(request, trained):
    return trained[request.param]
