"""No address overflows 32 bits: read off the compiler's own intermediate code, with no GPU.

An offset is a sum. A term of it is dangerous where it is a product, of 32 bits, of an index that
comes from the program's number or a loop and a size that only the call knows (a stride, a length)
or a width above a block's: that is how an element far into a tensor is addressed. An index along
one dimension alone is not: none has 2^31 places.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from gptopt.kernels.attention.triton_scores import head_rows
from gptopt.kernels.ffn.triton_dx import as_rows

LARGEST_BLOCK = 256  # a constant above it is no block's size but the width of a row

# Of each kernel the case with the most arguments, and the widest.
CASES = {
    "attention": "^attention_(bounds.*|.*bfloat16 d256( rich)?)$",
    "cross_entropy": "bfloat16 (gradient smoothing softcap|to bfloat16)$|^cross.*bwd.*float32 to b",
    "ffn": "bfloat16 swiglu.*",
    "layernorm": "float32 C(16384|768) (layer dropout residual|sum)$",
    "rotary": "bfloat16 d256 r128",
}

CODE = """
import json, re, sys
import triton
from triton._C.libtriton import ir
from gptopt.kernels import aot

def intermediate(case):
    config, target = case.config("sm_90"), aot._target("sm_90")
    source = aot._source(case, {**case.constexprs, **config.sizes})
    backend = triton.compiler.make_backend(target)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))

found = {}
for operator, pattern in json.loads(sys.argv[1]).items():
    for case in aot.cases(operator):
        name = case.kernel.__name__
        better = name not in found or "rich" in case.label
        if better and re.search(pattern, f"{name} {case.label}"):
            found[name] = intermediate(case)
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""

_NAME = r"%[\w$.-]+"
_VALUE = r"%[\w$.@-]+(?:#\d+)?"
_LINE = re.compile(rf"^\s*({_VALUE})(?::\d+)? = (\S+) (.*)$")
_PASSING = ("addi", "subi", "extsi", "extui", "splat", "broadcast", "expand_dims", "reshape",
            "trans", "select", "convert_layout", "trunci")  # fmt: skip


def dangerous(text: str) -> list[str]:
    """The lines that make a term of an address in 32 bits which needs 64."""
    lines = {}  # by value: (operation, operands, the line)
    indices, sizes, constants = set(), set(), {}
    latest = {}  # regions side by side use the same names again
    for number, line in enumerate(text.splitlines()):
        line = re.sub(r" loc\(.*\)$", "", line)
        defined = re.findall(rf"({_NAME})(?::\d+)? = ", line)
        latest |= {name: f"{name}@{number}" for name in defined}
        line = re.sub(_NAME, lambda m, new=latest: new.get(m[0], m[0]), line)
        if "tt.func" in line:
            sizes |= set(re.findall(rf"({_VALUE}): i(?:32|64)\b", line))
        if match := re.search(rf"scf\.for ({_VALUE}) =", line):
            indices.add(match[1])
        if not (match := _LINE.match(line)):
            continue
        value, operation, rest = match.groups()
        rest = rest.split(" : ")[0] if "constant" not in operation else rest
        operands = re.findall(_VALUE, rest)
        lines[value] = (operation, operands, line.strip())
        if size := re.match(r"(?:dense<)?(\d+)", rest if "constant" in operation else ""):
            constants[value] = int(size[1])
        if "load" in operation or "addptr" in operation:
            continue
        if "get_program_id" in operation or indices & set(operands):
            indices.add(value)
        elif sizes & set(operands):
            sizes.add(value)
    bad, seen = [], set()

    def walk(value: str) -> None:
        if value in seen or value not in lines:
            return
        seen.add(value)
        operation, operands, line = lines[value]
        if operation.endswith("muli"):
            narrow = re.search(r": (?:tensor<[\dx]+x)?i32>?$", line)
            index = [x for x in operands if x in indices]
            length = [x for x in operands if x in sizes or constants.get(x, 0) > LARGEST_BLOCK]
            if narrow and index and (length or len(index) == 2):
                bad.append(line)
        elif any(operation.endswith(name) for name in _PASSING):
            for operand in operands:
                walk(operand)

    for operation, operands, _ in list(lines.values()):
        if operation == "tt.addptr":
            walk(operands[1])
    return bad


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["cross_entropy", "ffn", "layernorm", "rotary"], id="rows"),
        pytest.param(["attention"], id="attention", marks=pytest.mark.slow),
    ],
)
def intermediates(request, tmp_path_factory):
    """The intermediate code of every kernel, by its name: from a process that compiles."""
    path = tmp_path_factory.mktemp("offsets") / "found.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cases = {name: CASES[name] for name in request.param}
    command = [sys.executable, "-P", "-c", CODE, json.dumps(cases), str(path)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(path.read_text())


def test_every_kernel_counts_elements_in_64_bits(intermediates):
    assert len(intermediates) >= 7
    assert all(text.count("tt.addptr") for text in intermediates.values())
    found = {name: dangerous(text) for name, text in intermediates.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_rows_too_far_apart_for_a_block_are_brought_together():
    """Within a block offsets have 32 bits: the launchers see to it that its rows are near."""
    for stride, kept in ((2**22, True), (2**22 + 1, False)):
        x = torch.empty_strided((3, 5), (stride, 1), device="meta")
        assert as_rows(x, 3).is_contiguous() != kept
        assert head_rows(x[None, None]).is_contiguous() != kept


def test_a_product_left_in_32_bits_is_seen(intermediates):
    """The check can fail: with every cast to 64 bits undone it finds each kernel of rows."""
    names = {"layernorm_fwd_kernel", "attention_fwd_kernel", "rotary_kernel", "ffn_fwd_kernel"}
    assert names & set(intermediates)
    for name in names & set(intermediates):
        assert dangerous(intermediates[name].replace("i64", "i32")), name
