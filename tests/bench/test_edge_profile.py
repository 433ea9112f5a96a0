"""The profile of a token: operators, how many nodes, shares of their sum."""

from gptopt.bench.edge_profile import _by_operator


def node(name, op, at, us, width=None):
    shape = [{"float": [1, 1, width or 8]}]
    args = {"op_name": op, "output_type_shape": shape}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": us, "args": args}


def test_nodes_are_added_up_by_operator_and_width():
    events = []
    for run, slow in enumerate((50, 1, 3)):  # the first run warms up
        at = 1000 * run
        events.append({"cat": "Session", "name": "model_run", "ts": at, "dur": 900})
        events += [
            node("a", "MatMul", at + 1, 10 * slow, 3072), node("b", "MatMul", at + 2, 20, 768),
            node("c", "MatMul", at + 3, 5, 768), node("d", "Add", at + 4, 2),
            node("e", "Attention", at + 5, 4),
        ]  # fmt: skip
        events.append({"cat": "Node", "name": "d_fence_before", "ts": at + 4, "dur": 99})
    found = _by_operator(events, tokens=2, weights={"a": 70, "b": 5, "c": 6}, cache=9)
    assert [tuple(row.values()) for row in found] == [
        ("MatMul", 768, 2, 25.0, 11), ("MatMul", 3072, 1, 20.0, 70), ("Attention", 0, 1, 4.0, 9),
        ("Add", 0, 1, 2.0, 0),
    ]  # fmt: skip
