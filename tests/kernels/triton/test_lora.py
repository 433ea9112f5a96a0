"""LoRA under the Triton bodies: what enters ffn as its addend, what stands beside the others."""

import copy

import pytest
import torch

from gptopt.config import LoraOptions, ModelConfig
from gptopt.lora import apply_lora, lora_parameters
from gptopt.model import GPT

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_inner": 24, "block_size": 14, "vocab_size": 32}
MODELS = {
    "gpt2": ({}, "attention,ffn"),
    "llama": (
        {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
         "n_kv_head": 1}, "q_proj,v_proj,gate_proj,down_proj",
    ),
}  # fmt: skip


def make(name, device):
    """The same adapted model twice, reference and Triton, and a batch."""
    options, targets = MODELS[name]
    torch.manual_seed(0)
    reference = GPT(ModelConfig(**TINY, **options), kernels="reference")
    apply_lora(reference, LoraOptions(rank=3, targets=targets, dropout=0.25))
    triton = GPT(reference.config, kernels="triton")
    apply_lora(triton, reference.lora)
    triton.load_state_dict(reference.state_dict())
    ids = torch.randint(32, (2, 9), device=device)
    return reference.to(device), triton.to(device), ids


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_adapter_leaves_every_bit(name, device, caplog):
    _, adapted, ids = make(name, device)
    plain = GPT(adapted.config, kernels="triton").to(device)
    plain.load_state_dict({n: w for n, w in adapted.state_dict().items() if "lora" not in n})
    assert torch.equal(adapted.eval()(ids).logits, plain.eval()(ids).logits)
    assert not caplog.messages  # the fused operator ran


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_the_adapter_follow_the_reference(name, device):
    reference, triton, ids = make(name, device)
    with torch.no_grad():
        for one, other in zip(lora_parameters(reference), lora_parameters(triton), strict=True):
            one.copy_(0.3 * torch.randn_like(one))
            other.copy_(one)
    exact = copy.deepcopy(reference).double()
    seed = torch.tensor(7, device=device)
    losses = []
    for model in (exact, reference, triton):
        loss = model.train()(ids[:, :-1], ids[:, 1:], seed=seed).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    grads = [[p.grad.double() for p in lora_parameters(m)] for m in (exact, reference, triton)]
    for true, near, said in zip(*grads, strict=True):
        budget = max(2 * (near - true).abs().max(), 2e-5 * true.abs().max())
        assert true.abs().max() > 0
        assert (said - true).abs().max() <= budget
    assert all(p.grad is None for p in triton.parameters() if not p.requires_grad)
