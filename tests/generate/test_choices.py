"""Multiple choice and likelihoods: the same numbers in PyTorch, onnxruntime and by hand."""

import json
import math

import numpy as np
import pytest
import torch

from gptopt.checkpoint import save_model
from gptopt.choices import evaluate_choices, read_questions
from gptopt.config import EvaluateOptions
from gptopt.errors import UserError
from gptopt.likelihood import open_likelihood

TEXT = "the cat sat on the mat and the dog ran to the door " * 20


@pytest.fixture(scope="module")
def model(make_reading_model):
    return make_reading_model(TEXT, vocab_size=300, block_size=24, spare=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path, *model)
    return path


def by_hand(model, context, continuation):
    ids = torch.tensor([[*context, *continuation]])
    logs = model(ids[:, :-1]).logits[0].double().log_softmax(-1)[-len(continuation) :]
    targets = torch.tensor(continuation)
    picked = logs[torch.arange(len(continuation)), targets]
    return float(picked.sum()), bool((logs.argmax(-1) == targets).all())


@torch.no_grad()
def test_likelihoods_are_those_of_each_row_alone(model, folder):
    gpt, tokenizer = model
    opened = open_likelihood(str(folder))
    ids = tokenizer.encode(TEXT)
    best = int(gpt(torch.tensor([ids[:7]])).logits[0, -1, : tokenizer.size].argmax())
    pairs = [(ids[:5], ids[5:9]), (ids[2:20], ids[20:21]), ([], ids[:3]), (ids[:7], [best])]
    for (context, continuation), scored in zip(pairs, opened.score(pairs), strict=True):
        expected, greedy = by_hand(gpt, context or [tokenizer.bos_id], continuation)
        assert math.isclose(scored.log_probability, expected, rel_tol=1e-4)
        assert (scored.tokens, scored.greedy) == (len(continuation), greedy)
    assert opened.score(pairs[3:])[0].greedy


@torch.no_grad()
def test_a_long_context_loses_its_oldest_tokens(model, folder):
    gpt, tokenizer = model
    ids = tokenizer.encode(TEXT)[:60]
    (scored,) = open_likelihood(str(folder)).score([(ids[:50], ids[50:60])])
    expected, _ = by_hand(gpt, ids[60 - 25 : 50], ids[50:60])
    assert math.isclose(scored.log_probability, expected, rel_tol=1e-4)


@pytest.mark.parametrize("count", [0, 25])
def test_a_continuation_must_fit(folder, count):
    with pytest.raises(UserError, match=f"has {count} tokens, expected 1 to 24"):
        open_likelihood(str(folder)).score([([1], [1] * count)])


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("the cat", " sat"), ("the cat ", "sat"), ("the c", "at"), ("", "the"), ("  ", "dog")],
)
def test_both_are_spelled_as_one_text(model, folder, context, continuation):
    _, tokenizer = model
    one, other = open_likelihood(str(folder)).pair(context, continuation)
    assert one + other == tokenizer.encode(context + continuation)
    assert tokenizer.decode(other).endswith(continuation)


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                            for line in lines))  # fmt: skip
    return path


@torch.no_grad()
def test_accuracy_counts_the_likeliest_choice(model, folder, tmp_path):
    gpt, _tokenizer = model
    generator = np.random.default_rng(5)
    words = [" cat", " dog ran", " door", " mat and the dog"]
    questions, plain, per_byte = [], 0, 0
    opened = open_likelihood(str(folder))
    for _ in range(12):
        choices = [str(each) for each in generator.permutation(words)[:3]]
        prompt = TEXT[: int(generator.integers(3, 40))].rstrip()
        answer = int(generator.integers(3))
        questions.append({"prompt": prompt, "choices": choices, "answer": answer})
        logs = [by_hand(gpt, *opened.pair(prompt, choice))[0] for choice in choices]
        plain += int(np.argmax(logs)) == answer
        rates = [log / len(choice) for log, choice in zip(logs, choices, strict=True)]
        per_byte += int(np.argmax(rates)) == answer
    path = write(tmp_path / "quiz.jsonl", *questions)
    result = evaluate_choices(EvaluateOptions(model=str(folder), choices=str(path), json=True))
    assert 0 < plain < 12
    assert result["accuracy"] == plain / 12
    assert result["accuracy_per_byte"] == per_byte / 12
    assert math.isclose(result["chance"], 1 / 3)
    assert math.isclose(result["standard_error"], math.sqrt(plain / 12 * (1 - plain / 12) / 11))


def test_an_exported_folder_answers_alike(model, folder, tmp_path):
    pytest.importorskip("onnx_ir")
    from gptopt.export.package import export_model

    gpt, tokenizer = model
    edge = tmp_path / "edge"
    export_model(gpt, tokenizer, edge, force=False)
    ids = tokenizer.encode(TEXT)
    pairs = [(ids[:5], ids[5:9]), (ids[2:20], ids[20:21]), ([], ids[:3])]
    scored = [open_likelihood(str(place)).score(pairs) for place in (folder, edge)]
    for ours, theirs in zip(*scored, strict=True):
        assert math.isclose(ours.log_probability, theirs.log_probability, rel_tol=1e-4)
        assert ours.greedy == theirs.greedy


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{\n", "is not JSON"),
        ("[1]\n", "found list, expected an object"),
        ({"choices": ["a", "b"], "answer": 0}, "prompt is None, expected text"),
        ({"prompt": 3, "choices": ["a", "b"], "answer": 0}, "prompt is 3"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "expected two or more texts"),
        ({"prompt": "x", "choices": "ab", "answer": 0}, "expected two or more texts"),
        ({"prompt": "x", "choices": ["a", ""], "answer": 0}, "expected two or more texts"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "a number from 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "answer is True"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, named):
    good = {"prompt": "x", "choices": ["a", "b"], "answer": 1}
    path = write(tmp_path / "quiz.jsonl", good, "\n", line)
    with pytest.raises(UserError, match=named) as error:
        read_questions(path)
    assert f"{path}:3: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_questions_and_none_at_all(tmp_path):
    with pytest.raises(UserError, match="holds no question"):
        read_questions(write(tmp_path / "quiz.jsonl", "\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "no.jsonl")


def test_text_or_questions_but_not_both_and_not_neither():
    for options in ({}, {"data": ["a"], "choices": "b"}):
        with pytest.raises(ValueError, match="--data, or questions with --choices"):
            EvaluateOptions(model="m", **options)
