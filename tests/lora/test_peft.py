"""The same adapters in PEFT, where it is installed: on the transformers model, both ways."""

import warnings

import pytest
import torch
from lora_models import tiny, trained

from gptopt.checkpoint import load_model, save_model
from gptopt.config import LoraOptions
from gptopt.config_classifier import Labelling
from gptopt.lora import base_of, begin, merge_lora
from gptopt.manifest import staged_folder
from gptopt.model import as_classifier

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those libraries' own
        yield


def close(one, other):
    return (one - other).abs().max() <= 2e-5 * (other.max() - other.min())


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "llama", "llama_biased"])
def test_peft_puts_our_adapter_on_the_transformers_model(saved, ids, shape, recwarn):
    base, folder, model = saved(shape, targets="attention,ffn", dropout=0.1, alpha=5.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = theirs(ids).logits
    on_base = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    assert close(on_base(ids).logits, model(ids).logits)
    assert not close(plain, model(ids).logits)
    # PEFT finds the base by itself, too.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert close(alone(ids).logits, model(ids).logits)
    assert close(on_base.merge_and_unload()(ids).logits, merge_lora(model)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_we_put_an_adapter_of_peft_on_our_model(saved, ids, shape, tmp_path):
    base, _, _ = saved(shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = ["c_attn", "c_proj"] if shape == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, target_modules=targets)
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    ours = load_model(base, adapter=tmp_path / "theirs").model
    assert close(ours(ids).logits, adapted(ids).logits)
    assert close(trained(ours, seed=5)(ids).logits, adapted(ids).logits) is not True


@pytest.fixture
def labelled(saved, tmp_path):
    """A base, an adapter of a classifier on it, and the model with it."""

    def write(shape):
        base, _, _ = saved(shape)
        plain = tiny(shape)
        config = Labelling(labels=["good", "bad", "odd"]).of(plain.config)
        model = as_classifier(plain, config)
        model.base = base_of(plain, base)
        model = begin(model, LoraOptions(rank=3, targets="attention,ffn"), model, base).eval()
        trained(model)
        with staged_folder(tmp_path / "labels") as folder:
            save_model(folder, model, None)
        return base, tmp_path / "labels", model

    return write


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_peft_puts_our_adapter_of_labels_on_the_transformers_model(labelled, ids, shape, recwarn):
    base, folder, model = labelled(shape)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs.config.pad_token_id = 63
    on_base = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert isinstance(on_base, peft.PeftModelForSequenceClassification)
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    row = ids[:1] % 63
    assert close(on_base(row).logits, model(row).logits)
    assert close(load_model(folder).model(row).logits, model(row).logits)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_we_put_an_adapter_of_labels_of_peft_on_our_model(saved, ids, shape, tmp_path):
    base, _, _ = saved(shape)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs.config.pad_token_id = 63
    targets = ["c_attn", "c_proj"] if shape == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=7, target_modules=targets)
    adapted = peft.get_peft_model(theirs, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    ours = load_model(base, adapter=tmp_path / "theirs").model
    assert ours.config.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    row = ids[:1] % 63
    assert close(ours(row).logits, adapted(row).logits)
