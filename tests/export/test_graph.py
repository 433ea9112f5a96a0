"""The graph itself: names, versions, weights stored once, few nodes, nothing of the tracer's."""

import onnx
import onnx_ir as ir
import pytest

DIMENSIONS = {
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length",
}  # fmt: skip


def dims(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_names_of_the_contract(llama):
    _, path = llama
    graph = onnx.load(path).graph
    inputs = {value.name: dims(value) for value in graph.input}
    outputs = {value.name: dims(value) for value in graph.output}
    tokens = ["batch_size", "sequence_length"]
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["input_ids"] == inputs["position_ids"] == tokens
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert outputs["logits"] == [*tokens, 2048]
    for i in range(2):
        for part in ("key", "value"):
            past, present = inputs[f"past_key_values.{i}.{part}"], outputs[f"present.{i}.{part}"]
            assert past == ["batch_size", 2, "past_sequence_length", 8]
            assert present == ["batch_size", 2, "total_sequence_length", 8]
    assert len(inputs) == 7
    assert len(outputs) == 5
    int64 = onnx.TensorProto.INT64
    assert all(v.type.tensor_type.elem_type == int64 for v in graph.input[:3])


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi"])
def test_no_other_dimension_name_occurs(name, request):
    graph = onnx.load(request.getfixturevalue(name)[1]).graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        assert {dim for dim in dims(value) if isinstance(dim, str)} <= DIMENSIONS, value.name


def test_versions_are_those_that_runtimes_read(gpt2):
    model = onnx.load(gpt2[1])
    assert model.ir_version == 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert not model.functions


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi"])
def test_only_standard_operators_that_onnxruntime_has_kernels_for(name, request):
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = {
        (kernel.domain, kernel.op_name)
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    for node in onnx.load(request.getfixturevalue(name)[1]).graph.node:
        assert (node.domain, node.op_type) in kernels


def test_tied_weights_are_stored_once(gpt2):
    model, path = gpt2
    graph = onnx.load(path).graph
    names = [weight.name for weight in graph.initializer]
    assert [name for name in names if "head" in name] == []
    assert names.count("wte.weight") == 1
    stored = sum(len(weight.raw_data) for weight in graph.initializer)
    parameters = 4 * model.num_parameters()
    assert parameters <= stored <= parameters + 1024


def test_weights_bear_the_names_of_the_parameters(llama):
    model, path = llama
    names = {weight.name for weight in onnx.load(path).graph.initializer}
    assert names >= set(dict(model.named_parameters()))


def test_linear_weights_are_multiplied_as_they_are_stored(llama):
    nodes = onnx.load(llama[1]).graph.node
    assert not [node for node in nodes if node.op_type == "Transpose"]


def test_a_tied_head_is_transposed_when_the_file_is_loaded(gpt2):
    transposes = [node for node in onnx.load(gpt2[1]).graph.node if node.op_type == "Transpose"]
    assert [list(node.input) for node in transposes] == [["wte.weight"]]


@pytest.mark.parametrize(("name", "layer", "rest"), [("gpt2", 15, 20), ("llama", 16, 35)])
def test_a_layer_is_few_nodes(name, layer, rest, request):
    model, path = request.getfixturevalue(name)
    assert ir.load(path).graph.num_nodes() <= layer * len(model.blocks) + rest


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi"])
def test_the_mask_is_computed_once(name, request):
    _, path = request.getfixturevalue(name)
    graph = ir.load(path).graph
    masks = {node.inputs[3].name for node in graph if node.op_type == "Attention"}
    assert len(masks) == 1
    assert sum(node.op_type == "Where" for node in graph) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi"])
def test_attention_splits_its_heads_itself(name, request):
    graph = ir.load(request.getfixturevalue(name)[1]).graph
    kinds = [node.op_type for node in graph]
    assert "Reshape" not in kinds
    for node in graph:
        if node.op_type == "Attention":
            assert node.attributes["q_num_heads"].as_int() == 4


def test_nothing_of_the_tracer_or_the_machine_stays(gpt2):
    model = onnx.load(gpt2[1])
    graph = model.graph
    assert not model.metadata_props
    assert not graph.metadata_props
    assert not graph.doc_string
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert not any(
        value.metadata_props for value in (*graph.input, *graph.output, *graph.value_info)
    )
    content = gpt2[1].read_bytes()
    assert b".py" not in content
    assert b"torch" not in content
    assert model.producer_name == "gptopt"
