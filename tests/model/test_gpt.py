"""What a forward pass promises for every option: padding, caches and chunks change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptopt.config import ModelConfig
from gptopt.model import GPT

LONG, SHORT, NEW = 11, 7, 3  # tokens of two prompts, and of what follows them


def prompts(vocab_size=96):
    """Two prompts of different length, and the tokens that follow each."""
    generator = torch.Generator().manual_seed(5)
    return (torch.randint(vocab_size, (n,), generator=generator) for n in (LONG, SHORT, NEW, NEW))


def padded(long, short, side):
    """Both prompts as one batch with its mask."""
    gap = torch.full((LONG - SHORT,), 3)
    row = torch.cat((gap, short) if side == "left" else (short, gap))
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, : LONG - SHORT] = 0 if side == "left" else 1
    mask[1, SHORT:] = 0 if side == "right" else mask[1, SHORT:]
    return torch.stack((long, row)), mask


def real(logits, side):
    """The short prompt's own positions of a padded batch."""
    return logits[1, LONG - SHORT :] if side == "left" else logits[1, :SHORT]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(build, options, side):
    model = build(**options)
    long, short, *_ = prompts()
    ids, mask = padded(long, short, side)
    logits = model(ids, attention_mask=mask).logits
    same(logits[0], model(long[None]).logits[0])
    same(real(logits, side), model(short[None]).logits[0])


def test_padding_changes_no_logit_of_a_bidirectional_model(build):
    model = build(causal=False, position="alibi")
    long, short, *_ = prompts()
    for side in ("left", "right"):
        ids, mask = padded(long, short, side)
        same(real(model(ids, attention_mask=mask).logits, side), model(short[None]).logits[0])


@pytest.mark.parametrize("chunks", [(1,) * (LONG + NEW), (4, 5, 2, 3), (LONG, 1, 1, 1)])
def test_prefill_in_chunks_equals_the_whole(build, options, chunks):
    model = build(**options)
    long, _, new, _ = prompts()
    ids = torch.cat((long, new))[None]
    whole, past, parts = model(ids).logits, None, []
    for chunk in ids.split(list(chunks), dim=1):
        out = model(chunk, past=past, use_cache=True)
        past = out.present
        parts.append(out.logits)
    same(torch.cat(parts, dim=1), whole)
    assert past[0][0].shape == (1, model.config.kv_heads, LONG + NEW, model.config.head_size)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prefill_in_chunks_then_decode_equals_unpadded(build, options, side):
    model = build(**options)
    long, short, after_long, after_short = prompts()
    ids, mask = padded(long, short, side)
    ids = torch.cat((ids, torch.stack((after_long, after_short))), dim=1)
    mask = torch.cat((mask, torch.ones(2, NEW, dtype=torch.long)), dim=1)
    past, parts, end = None, [], 0
    for chunk in ids.split([4, 7, 1, 1, 1], dim=1):
        end += chunk.shape[1]
        out = model(chunk, past=past, attention_mask=mask[:, :end], use_cache=True)
        past = out.present
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    same(logits[0], model(torch.cat((long, after_long))[None]).logits[0])
    expected = model(torch.cat((short, after_short))[None]).logits[0]
    same(torch.cat((real(logits[:, :LONG], side), logits[1, LONG:])), expected)


def test_these_comparisons_notice_any_one_block(build, options):
    ids = next(prompts())[None]
    whole = build(**options)(ids).logits
    for layer in range(2):
        model = build(**options)
        with torch.no_grad():
            for parameter in model.blocks[layer].parameters():
                parameter.zero_()
        assert (model(ids).logits - whole).abs().max() > 1e-3


def test_order_matters_exactly_where_positions_say_so(build, options):
    model = build(**options)
    ids = next(prompts())[None]
    swapped = ids[:, [1, 0, *range(2, LONG)]]
    difference = (model(ids).logits - model(swapped).logits)[0, 2:].abs().max()
    blind = model.position == "none" and options.get("window") is None
    # Without positions only what the first two tokens themselves computed can tell their order.
    assert difference > (1e-9 if blind else 1e-6)


def test_future_tokens_are_invisible_to_a_causal_model_only(build):
    ids = next(prompts())[None]
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 96
    causal, both = build(), build(causal=False)
    same(causal(ids).logits[:, :-1], causal(changed).logits[:, :-1])
    assert (both(ids).logits - both(changed).logits)[:, :-1].abs().max() > 1e-3


def test_documents_do_not_see_each_other(build):
    model = build(position="alibi")
    long, short, *_ = prompts()
    packed = torch.cat((long, short))[None]
    documents = torch.tensor([[0] * LONG + [1] * SHORT])
    logits = model(packed, doc_ids=documents).logits[0]
    same(logits[:LONG], model(long[None]).logits[0])
    same(logits[LONG:], model(short[None]).logits[0])


def test_given_position_ids_are_used(build):
    model = build()
    ids = next(prompts())[None]
    shifted = torch.arange(5, 5 + LONG)[None]
    padding = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, LONG)), dim=1)
    late = model(ids, position_ids=shifted).logits
    assert (late - model(ids).logits).abs().max() > 1e-3
    explicit = torch.cat((padding, shifted), dim=1)
    batch = torch.cat((padding, ids), dim=1)
    same(model(batch, attention_mask=mask, position_ids=explicit).logits[:, 5:], late)


def test_logits_to_keep_keeps_the_last(build):
    model = build()
    ids = next(prompts())[None]
    same(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_positions_beyond_the_context_are_an_error(build):
    ids = torch.zeros(1, 49, dtype=torch.long)
    for position in ("learned", "sinusoidal"):
        model = build(position=position)
        with pytest.raises(ValueError, match="position 48 is beyond block_size=48"):
            model(ids)
        with pytest.raises(ValueError, match="position 60 is beyond"):
            model(ids[:, :1], position_ids=torch.tensor([[60]]))
        past = model(ids[:, :48], use_cache=True).present
        with pytest.raises(ValueError, match="beyond block_size"):
            model(ids[:, :1], past=past)
        mask = torch.ones(1, 49)
        mask[0, 0] = 0
        assert model(ids, attention_mask=mask).logits.isfinite().all()  # 48 real tokens do fit
    assert build(position="rotary")(ids).logits.isfinite().all()


def test_inputs_that_do_not_fit_are_named(build):
    model = build()
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="ids: expected shape"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask: expected shape .* \(2, 4\), found"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="past: expected 2 layers, found 1"):
        model(ids, past=model(ids, use_cache=True).present[:1])
    with pytest.raises(ValueError, match="bidirectional model has no cache"):
        build(causal=False)(ids, use_cache=True)
    with pytest.raises(ValueError, match="vocab_size is not set"):
        GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8))


def test_lower_precision_keeps_exact_angles(build):
    """Position tables are fp32 whatever the weights are: bfloat16 cannot count beyond 256."""
    model = build(position="rotary", block_size=4096, dtype=torch.bfloat16)
    ids = next(prompts())[None]
    near = model(ids, position_ids=torch.arange(LONG)[None]).logits
    far = model(ids, position_ids=torch.arange(2001, 2001 + LONG)[None]).logits
    # rotary is relative: a common shift changes nothing but rounding
    assert (near - far).abs().max() < 0.1 * near.float().std()


def test_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=3, n_head=4, n_embd=128, vocab_size=512, tie_head=False))
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}
    residual = 0.02 / math.sqrt(6)
    for name, std in stds.items():
        expected = residual if name.endswith(("attn.proj.weight", "ffn.down.weight")) else 0.02
        assert std == pytest.approx(expected, rel=0.03), name
        assert abs(dict(model.named_parameters())[name].mean()) < 0.02 * expected * 3, name
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    loss = model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None]).loss
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_parameters_are_counted_once(build):
    tied, untied = build(), build(tie_head=False)
    C, V = 32, 96
    block = 2 * 2 * C + C * 3 * C + 3 * C + C * C + C + C * 4 * C + 4 * C + 4 * C * C + C
    assert tied.num_parameters() == V * C + 48 * C + 2 * block + 2 * C
    assert untied.num_parameters() == tied.num_parameters() + V * C
    assert not list(tied.buffers())


def test_loss_is_the_cross_entropy_of_the_logits(build, options):
    model = build(**options)
    ids = torch.stack([torch.cat(list(prompts())[:1]), torch.arange(LONG)])
    targets = ids.roll(-1, dims=1)
    targets[0, :4] = -100
    out = model(ids, targets)
    assert out.logits is None
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    same(out.loss, expected)
