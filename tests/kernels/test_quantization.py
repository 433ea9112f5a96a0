"""The weight and cache formats are those of onnxruntime's kernels, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.kernels.quantization import (
    cache_scale,
    codes_of,
    dequantize,
    dequantize_cache,
    dequantize_channels,
    fake_quantize,
    on_grid,
    quantize,
    quantize_cache,
    quantize_channels,
)

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

MICROSOFT = "com.microsoft"
FLOAT = onnx.TensorProto.FLOAT
FORMATS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def run(op, inputs, fed, outputs=("y",), **attributes):
    """One node of onnxruntime, with inputs in order (None: left out), some fed, the others stored.

    An output called like an input, with `_out` behind it, has its type.
    """
    helper = onnx.helper
    held = {name: array(value) for name, value in inputs.items() if value is not None}
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in held.items()}
    kinds = {f"{name}_out": kind for name, kind in kinds.items()} | kinds
    names = [name if name in held else "" for name in inputs]
    graph = helper.make_graph(
        [helper.make_node(op, names, list(outputs), domain=MICROSOFT, **attributes)],
        "one",
        [helper.make_tensor_value_info(name, kinds[name], None) for name in fed],
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), None) for n in outputs],
        [onnx.numpy_helper.from_array(v, n) for n, v in held.items() if n not in fed],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: held[name] for name in fed})


def array(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


def through_matmul(blocks, accuracy_level):
    """The matrix (N, K) that MatMulNBits multiplies with: its product with the identity."""
    N, K = blocks.packed.shape[0], blocks.columns
    found = run(
        "MatMulNBits",
        {"a": torch.eye(K), "b": blocks.packed, "s": blocks.scales, "z": blocks.zero_points},
        ["a"],
        K=K, N=N, bits=blocks.bits, block_size=blocks.block, accuracy_level=accuracy_level,
    )  # fmt: skip
    return found[0].T


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("columns", "block"), [(64, 16), (96, 32), (100, 32), (40, 64), (300, 128)]
)
def test_matmul_nbits_reads_the_same_matrix_to_the_bit(bits, symmetric, columns, block):
    weight = torch.randn(7, columns)
    blocks = quantize(weight, bits=bits, block=block, symmetric=symmetric)
    np.testing.assert_array_equal(through_matmul(blocks, 0), dequantize(blocks).numpy())


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_int8_products_read_the_same_matrix(bits, symmetric):
    blocks = quantize(torch.randn(24, 128), bits=bits, block=32, symmetric=symmetric)
    # The identity survives int8; what differs is one rounding of the sum's scale.
    found, wanted = through_matmul(blocks, 4), dequantize(blocks).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 16), (160, 32)])
def test_gather_block_quantized_reads_the_same_rows_to_the_bit(bits, symmetric, width, block):
    blocks = quantize(torch.randn(11, width), bits=bits, block=block, symmetric=symmetric)
    ids = np.array([[3, 0, 10], [10, 7, 3]])
    table = {"d": blocks.packed.flatten(1), "ids": ids, "s": blocks.scales, "z": blocks.zero_points}
    found = run(
        "GatherBlockQuantized", table, ["ids"],
        bits=bits, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    np.testing.assert_array_equal(found[0], dequantize(blocks).numpy()[ids])


def test_the_first_code_lies_in_the_lowest_bits():
    weight = torch.tensor([[-8.0, -7.0, 1.0, 7.0] + [0.0] * 12])
    blocks = quantize(weight, bits=4, block=16)
    assert blocks.scales.item() == 1.0
    assert blocks.packed[0, 0, :3].tolist() == [0x10, 0xF9, 0x88]


def test_dynamic_int8_products_read_the_same_matrix():
    weight = torch.randn(24, 48)
    channels = quantize_channels(weight)
    x = torch.randint(-5, 6, (6, 48)).float()
    x[:, :2] = torch.tensor([-128.0, 127.0])  # so that whole numbers are int8 with a scale of 1
    taken = {"a": x, "b": channels.codes.T.contiguous(), "s": channels.scales}
    found = run("DynamicQuantizeMatMul", taken, ["a"])[0]
    wanted = x @ dequantize_channels(channels).T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-4)


def neighbours(codes):
    """Largest sum, in magnitude, of two neighbouring codes of one sign."""
    pairs = torch.nn.functional.pad(codes.int(), (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    return max(int(part.clamp(min=0).sum(-1).max()) for part in (pairs, -pairs))


def test_dynamic_int8_products_overflow_no_16_bits():
    torch.manual_seed(0)
    weight = torch.randn(96, 768)
    # Both inputs of the largest pair at the top of their range: what saturates, saturates here.
    channels = quantize_channels(weight)
    x = torch.ones(3, 768)
    x[1], x[2] = channels.codes[0].sign().clamp(min=0), torch.arange(768) % 256 / 255
    taken = {"a": x, "b": channels.codes.T.contiguous(), "s": channels.scales}
    found = run("DynamicQuantizeMatMul", taken, ["a"])[0]
    wanted = x.double() @ dequantize_channels(channels).double().T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-3)
    assert neighbours(channels.codes) == 128
    plain = (weight / weight.abs().amax(1, keepdim=True) * 127).round()
    assert neighbours(plain) > 128  # which is what 255 (a + b) <= 2^15 - 1 forbids


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_int8_channels_are_safe_and_found_again(N, K, seed, scale):
    draw = np.random.default_rng(seed)
    weight = torch.from_numpy((draw.standard_t(2, (N, K)) * scale).astype(np.float32))
    channels = quantize_channels(weight)
    assert neighbours(channels.codes) <= 128
    rounded = dequantize_channels(channels)
    assert ((rounded - weight).abs() <= channels.scales.unsqueeze(1) * 0.5001).all()
    again = quantize_channels(rounded)
    assert torch.equal(again.codes, channels.codes)
    torch.testing.assert_close(again.scales, channels.scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_an_int8_cache_holds_what_the_kernel_writes(per):
    B, H, K, D, T = 2, 4, 2, 16, 9
    q, k, v = torch.randn(B, T, H * D), torch.randn(B, T, K * D), torch.randn(B, T, K * D)
    heads = [x.view(B, T, K, D).transpose(1, 2) for x in (k, v)]
    heads[0][:, 1] *= 20  # one loud head
    k = heads[0].transpose(1, 2).reshape(B, T, K * D)
    scales = [cache_scale(x.abs().amax((0, 2)), per=per) for x in heads]
    fed = {"q": q, "k": k, "v": v, "key": torch.zeros(B, K, 0, D, dtype=torch.int8)}
    fed |= {"value": fed["key"].clone(), "last": torch.full((B,), T - 1, dtype=torch.int32)}
    fed |= {"total": torch.tensor(T, dtype=torch.int32)}
    unused = dict.fromkeys(("cos", "sin", "positions", "bias", "sink"))
    _, *present = run(
        "GroupQueryAttention",
        fed | unused | {"ks": scales[0], "vs": scales[1]},
        list(fed),
        ("y", "key_out", "value_out"),
        num_heads=H, kv_num_heads=K, kv_cache_bit_width=8,
        k_quant_type=f"PER_{per.upper()}", v_quant_type=f"PER_{per.upper()}",
    )  # fmt: skip
    for found, x, scale in zip(present, heads, scales, strict=True):
        wanted = quantize_cache(x, scale)
        np.testing.assert_array_equal(found, wanted.numpy())
        error = (dequantize_cache(wanted, scale) - x).abs()
        assert (error <= 0.501 * scale).all()


matrices = st.builds(
    lambda seed, rows, columns, size, empty: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        * 10.0**size
        * (torch.arange(rows) != empty)[:, None]
    ),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 150),
    st.integers(-8, 8),
    st.integers(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]), st.booleans())
def test_rounding_errs_by_a_step_at_most(weight, bits, block, symmetric):
    blocks = quantize(weight, bits=bits, block=block, symmetric=symmetric)
    steps = blocks.scales.abs().repeat_interleave(block, 1)[:, : weight.shape[1]]
    assert ((dequantize(blocks) - weight).abs() <= 1.0001 * steps).all()


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]))
def test_rounding_what_is_rounded_changes_nothing(weight, bits, block):
    once = dequantize(quantize(weight, bits=bits, block=block))
    torch.testing.assert_close(
        dequantize(quantize(once, bits=bits, block=block)), once, rtol=0, atol=0
    )


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from([2, 4]), st.booleans())
def test_codes_past_the_last_column_are_zero_points(weight, bits, symmetric):
    blocks = quantize(weight, bits=bits, block=64, symmetric=symmetric)
    codes, zeros = codes_of(blocks)
    centred = (codes.int() - zeros.int()[..., None]).flatten(1)
    assert (centred[:, weight.shape[1] :] == 0).all()


def test_fake_quantising_rounds_forward_and_passes_gradients_straight():
    weight = torch.randn(6, 64, requires_grad=True)
    rounded = fake_quantize(weight, bits=4, block=32)
    torch.testing.assert_close(
        rounded, dequantize(quantize(weight.detach(), bits=4, block=32)), rtol=0, atol=1e-6
    )
    seen = torch.randn(6, 64)
    (rounded * seen).sum().backward()
    torch.testing.assert_close(weight.grad, seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3, expected one of"),
        ({"block": 48}, "block is 48, expected one of"),
        ({"method": "best"}, "method is 'best'"),
        ({"method": "gptq"}, "hessian is None"),
        ({"importance": torch.ones(3)}, r"importance is of shape \(3,\)"),
        ({"weight": torch.ones(4, 64, dtype=torch.float64)}, "weight is of dtype torch.float64"),
        ({"weight": torch.ones(64)}, r"weight is of shape \(64,\)"),
        ({"weight": torch.full((4, 64), torch.inf)}, "weight is not finite everywhere"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {"weight": torch.ones(4, 64), "bits": 4, "block": 32, **change}
    weight = arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        quantize(weight, **arguments)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_on_its_own_grid_a_weight_is_rounded_as_it_was(bits, symmetric):
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    form = {"bits": bits, "block": 32}
    found = quantize(weight, symmetric=symmetric, **form)
    grid = (found.scales, codes_of(found)[1])
    rounded = on_grid(weight, *grid, **form)
    assert torch.equal(rounded, dequantize(found))
    assert torch.equal(on_grid(rounded, *grid, **form), rounded)
    ends = on_grid(1000 * weight, *grid, **form)  # what is beyond the range becomes its end
    assert ends.abs().max() <= 2**bits * found.scales.abs().max()
    with pytest.raises(ValueError, match="scales"):
        on_grid(weight, found.scales[:, 1:], grid[1], **form)
