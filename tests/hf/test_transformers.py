"""Equality with transformers on random weights, and each side loads the other's folder."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptopt.checkpoint import load_model, save_model

NAMES = (
    "gpt2", "gpt2_untied_relu", "gpt2_gelu_inner", "llama", "llama_gqa_tied",
    "llama_mqa_head_dim", "llama_bias_gelu_theta", "mistral_window", "mistral_whole", "qwen2",
    "qwen3", "phi3",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def batch(T=100):
    return torch.randint(512, (3, T), generator=torch.Generator().manual_seed(2))


def check_budget(ours, theirs, exact):
    """At most twice the error of fp32 transformers, or 2e-5 of the range."""
    budget = max(2 * (theirs.double() - exact).abs().max(), 2e-5 * (exact.max() - exact.min()))
    assert (ours.double() - exact).abs().max() <= budget


@torch.no_grad()
def test_logits_are_within_the_budget(theirs, name):
    model, folder = theirs(name)
    ours = load_model(folder).model
    ids = batch()
    exact = copy.deepcopy(model).double()(ids).logits
    check_budget(ours(ids).logits, model(ids).logits, exact)
    # The test can fail: the model says many different things, and every block matters.
    assert exact.argmax(-1).unique().numel() >= 64
    for block in ours.blocks:
        kept = copy.deepcopy(block.state_dict())
        for parameter in block.parameters():
            parameter.zero_()
        with pytest.raises(AssertionError):
            check_budget(ours(ids).logits, model(ids).logits, exact)
        block.load_state_dict(kept)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_chunks_and_decode_are_within_the_budget(theirs, name, side):
    model, folder = theirs(name)
    ours, exact_model = load_model(folder).model, copy.deepcopy(model).double()
    ids, gap = batch(40), 6
    mask = torch.ones_like(ids)
    rows = slice(gap, None) if side == "left" else slice(0, ids.shape[1] - gap)
    mask[1] = 0
    mask[1, rows] = 1
    past, parts, end = None, [], 0
    for chunk in ids.split([20, 17, 1, 1, 1], dim=1):
        end += chunk.shape[1]
        out = ours(chunk, past=past, attention_mask=mask[:, :end], use_cache=True)
        past = out.present
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    for row in range(3):
        own = rows if row == 1 else slice(None)
        alone = ids[row : row + 1, own]
        exact = exact_model(alone).logits[0]
        check_budget(logits[row, own], model(alone).logits[0], exact)


@torch.no_grad()
def test_a_batch_padded_left_equals_theirs(theirs, name):
    model, folder = theirs(name)
    ours, ids = load_model(folder).model, batch()
    mask = torch.ones_like(ids)
    mask[2, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    their_logits = model(ids, attention_mask=mask, position_ids=positions).logits
    logits = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[2, 9:], their_logits[2, 9:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:2], their_logits[:2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_decoding_says_the_same(theirs, name):
    model, folder = theirs(name)
    ours, ids = load_model(folder).model, batch(8)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    past, tokens = None, ids
    for _ in range(40):
        out = ours(tokens if past is None else tokens[:, -1:], past=past, use_cache=True)
        past = out.present
        tokens = torch.cat((tokens, out.logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, expected)


def read_by_transformers(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in report), report
    return model.eval()


@torch.no_grad()
def test_they_load_what_we_wrote(theirs, name, tmp_path):
    model, folder = theirs(name)
    ours = load_model(folder).model
    save_model(tmp_path, ours, None)
    back = read_by_transformers(tmp_path)
    written_as = {"mistral_whole": "LlamaForCausalLM", "phi3": "MistralForCausalLM"}
    assert type(back).__name__ == written_as.get(name, type(model).__name__)
    ids = batch()
    if name == "phi3":  # the same products, of one matrix there and of three here
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(back(ids).logits, model(ids).logits)
    again = load_model(tmp_path).model
    assert again.config == ours.config
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    # What they write of it, with our key kept among theirs, is ours to read as well.
    back.save_pretrained(tmp_path / "again")
    assert "gptopt" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert load_model(tmp_path / "again").model.config == ours.config


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"activation": "relu2", "tie_head": False, "n_inner": 40},
        {
            "norm": "rmsnorm", "position": "rotary", "activation": "geglu", "bias": False,
            "n_kv_head": 2, "head_dim": 6, "rotary_base": 1000.0, "norm_eps": 1e-3,
        },
        {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "tie_head": False},
    ],
)  # fmt: skip
def test_they_load_models_made_here(options, tmp_path):
    from gptopt.config import ModelConfig
    from gptopt.model import GPT

    torch.manual_seed(4)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 512}
    model = GPT(ModelConfig(**sizes, **options)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_model(tmp_path, model, None)
    ids = batch(50)
    their_logits = read_by_transformers(tmp_path)(ids).logits
    torch.testing.assert_close(their_logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def rewrite(folder, change):
    """Store the weights as older programs did."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_hub_gpt2_without_prefix_and_with_mask_buffers(theirs, copy_of):
    model, _ = theirs("gpt2")
    folder = copy_of("gpt2")

    def as_on_the_hub(tensors):
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            mask = torch.ones(128, 128, dtype=torch.uint8).tril()[None, None]
            plain[f"h.{layer}.attn.bias"] = mask
            plain[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return plain

    rewrite(folder, as_on_the_hub)
    ids = batch()
    torch.testing.assert_close(
        load_model(folder).model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_hub_llama_with_old_keys_buffers_and_half_weights(theirs, copy_of):
    model, _ = theirs("llama_bias_gelu_theta")
    folder = copy_of(
        "llama_bias_gelu_theta", rope_theta=500.0, rope_scaling=None, torch_dtype="bfloat16",
        pretraining_tp=1, _name_or_path="somewhere",
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))

    def as_on_the_hub(tensors):
        halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        halves["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return halves

    rewrite(folder, as_on_the_hub)
    ours = load_model(folder).model
    assert ours.config.rotary_base == 500.0
    assert ours.wte.weight.dtype == torch.float32
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16())
    ids = batch()
    torch.testing.assert_close(ours(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa_tied"])
def test_their_shards_and_fp16_weights_behind_links(theirs, name, tmp_path):
    model, _ = theirs(name)
    half = copy.deepcopy(model).half()
    half.save_pretrained(tmp_path / "blobs", max_shard_size="20KB")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    shards = list((tmp_path / "blobs").iterdir())
    assert sum(path.suffix == ".safetensors" for path in shards) > 2
    for path in shards:
        (snapshot / path.name).symlink_to(path)
    ours = load_model(snapshot).model
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.half())
    ids = batch()
    torch.testing.assert_close(ours(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-4)
