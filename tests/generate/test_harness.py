"""lm-evaluation-harness on our models, on a task made of local files."""

import json
import math

import pytest

# Before what imports it.
pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'gptopt[eval]'")

import lm_eval
from lm_eval.tasks import TaskManager

from gptopt.harness import HarnessModel
from gptopt.likelihood import open_likelihood

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, and its libraries'
TEXT = "the cat sat on the mat and the dog ran to the door " * 20
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "x",
        "generation_kwargs": {"until": ["door"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(make_reading_model, make_folders):
    """(model folder, exported folder) of one random model."""
    return make_folders(*make_reading_model(TEXT, vocab_size=300, block_size=24))


@pytest.fixture
def tasks(tmp_path):
    rows = [
        {"prompt": TEXT[: 11 + 7 * at].rstrip(), "choices": [" cat", " dog ran", " door"],
         "answer": at % 3}
        for at in range(9)
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        source = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(source | task))
    return TaskManager(include_path=str(tmp_path), include_defaults=False), rows


def test_tasks_say_the_same_of_the_model_and_of_its_export(folders, tasks):
    manager, rows = tasks
    said = [
        lm_eval.simple_evaluate(
            model=HarnessModel(folder), tasks=list(TASKS), task_manager=manager,
            bootstrap_iters=0,
        )["results"]
        for folder in folders
    ]  # fmt: skip
    torch_said, edge_said = said
    assert torch_said["local_choice"]["acc,none"] == edge_said["local_choice"]["acc,none"]
    ours = torch_said["local_text"]["byte_perplexity,none"]
    assert math.isclose(ours, edge_said["local_text"]["byte_perplexity,none"], rel_tol=1e-4)
    model = open_likelihood(folders[0])
    nats = size = right = 0.0
    for row in rows:
        ids = model.tokenizer.encode(row["prompt"])
        parts = [(ids[max(0, at - 24) : at], ids[at : at + 24]) for at in range(0, len(ids), 24)]
        nats += sum(each.log_probability for each in model.score(parts))
        size += len(row["prompt"].encode())
        scored = model.score([model.pair(row["prompt"], choice) for choice in row["choices"]])
        likely = [each.log_probability for each in scored]
        right += likely.index(max(likely)) == row["answer"]
    assert math.isclose(ours, math.exp(-nats / size), rel_tol=1e-6)
    assert math.isclose(torch_said["local_choice"]["acc,none"], right / len(rows))
    assert 0 < right < len(rows)


def test_a_continuation_ends_before_its_stop_text(folders):
    class Request:
        args = ("the cat", {"until": ["a"], "max_gen_toks": 20})

    (text,) = HarnessModel(folders[0]).generate_until([Request()])
    assert text
    assert "a" not in text
