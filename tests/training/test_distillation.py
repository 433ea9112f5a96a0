"""Distillation: the mixed loss, whose tokenizer reads, and what a teacher must be."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gptopt.checkpoint import load_model
from gptopt.errors import UserError
from gptopt.training import train
from gptopt.training.distillation import Distilled

TEACHER = {"n_layer": 2, "n_embd": 32}


@pytest.fixture
def teacher(options):
    return train(options("teacher", steps=12, lr=1e-2, model=TEACHER))["checkpoint"]


def taught(teacher, **more):
    return {"teacher": str(teacher)} | more


def test_the_loss_is_the_two_targets_mixed(options, teacher, tmp_path):
    given = options(distill=taught(teacher, temperature=3.0, weight=0.25), label_smoothing=0.1)
    objective = Distilled(given)
    objective.open(tmp_path, None, resuming=False)
    config = objective.model_config(None, resuming=False)
    torch.manual_seed(1)
    model = objective.build(config, None).double().eval()
    objective._teacher.model.double()
    batch = objective.batches(config, 3, 0, 1).next()
    inputs = {name: torch.from_numpy(value.copy()) for name, value in batch.inputs.items()}
    loss = objective.loss(model, inputs, **objective.keywords())

    size = objective.tokenizer.size
    logits = model(inputs["ids"]).logits
    plain = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), label_smoothing=0.1)
    p = (objective._teacher.model(inputs["ids"]).logits[..., :size] / 3).softmax(-1)
    q = (logits[..., :size] / 3).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(
        loss, (0.75 * plain + 0.25 * 9 * divergence).to(loss.dtype), rtol=1e-5, atol=0
    )
    loss.backward()
    assert all(parameter.grad is None for parameter in objective._teacher.model.parameters())


def test_of_a_perfect_student_nothing_is_asked(options, teacher, tmp_path):
    objective = Distilled(options(distill=taught(teacher, weight=1.0), model=TEACHER))
    objective.open(tmp_path, None, resuming=False)
    config = objective.model_config(None, resuming=False)
    batch = objective.batches(config, 3, 0, 1).next()
    inputs = {name: torch.from_numpy(value.copy()) for name, value in batch.inputs.items()}
    student = copy.deepcopy(objective._teacher.model).requires_grad_(True)
    loss = objective.loss(student, inputs, **objective.keywords())
    assert abs(float(loss.detach())) < 1e-6


def test_a_new_student_reads_with_its_teachers_tokenizer(options, teacher):
    data = {"kind": "bpe", "vocab_size": 300}  # were it asked to learn its own
    result = train(options("student", distill=taught(teacher), data=data))
    student = load_model(result["checkpoint"])
    assert student.tokenizer.sha256 == load_model(teacher).tokenizer.sha256
    assert student.model.config.n_layer == 1


def test_a_model_of_transformers_teaches(options, teacher, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = load_model(teacher).tokenizer
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=tokenizer.size + 3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.transformer.wte.weight.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")

    given = options(distill=taught(tmp_path / "theirs", weight=1.0))
    objective = Distilled(given)
    objective.open(tmp_path, None, resuming=False)
    config = objective.model_config(None, resuming=False)
    student = objective.build(config, None).eval()
    batch = objective.batches(config, 3, 0, 1).next()
    inputs = {name: torch.from_numpy(value.copy()) for name, value in batch.inputs.items()}
    with torch.no_grad():
        loss = objective.loss(student, inputs, **objective.keywords())
        p = theirs(inputs["ids"]).logits[..., : tokenizer.size].log_softmax(-1)
        q = student(inputs["ids"]).logits[..., : tokenizer.size].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    result = train(given)
    assert load_model(result["checkpoint"]).tokenizer.sha256 == tokenizer.sha256


def test_a_taught_run_resumes_bit_for_bit(options, teacher):
    same = {"distill": taught(teacher), "schedule": "constant", "model": {"dropout": 0.1}}
    whole = train(options("whole", steps=8, **same))
    train(options("parts", steps=4, **same))
    part = train(options("parts", steps=8, resume=True, **same))
    assert part["resumed_from"] == 4
    one, other = (load_model(each["checkpoint"]).model.state_dict() for each in (whole, part))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_another_teacher_is_no_resume(options, teacher):
    train(options("run", distill=taught(teacher), steps=2))
    with pytest.raises(UserError, match=r"another distill\.weight"):
        train(options("run", distill=taught(teacher, weight=0.5), steps=4, resume=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"block_size": 16}}, "the teacher sees 8 tokens"),
        ({"distill": {"teacher": "/nowhere"}}, "/nowhere"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(options, teacher, changes, named):
    with pytest.raises(UserError, match=named) as error:
        train(options("student", **({"distill": taught(teacher)} | changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"distill": {"weight": 0.5}}, "need a teacher"),
        ({"distill": {"teacher": "t"}, "objective": "masked"}, "teaches next tokens"),
        ({"distill": {"teacher": "t"}, "z_loss": 0.1}, "knows no --z-loss"),
    ],
)
def test_options_that_contradict_each_other(options, changes, named):
    with pytest.raises(ValueError, match=named):
        options("student", **changes)
