"""Files that this runtime does not read and other clients obey: hostile ones are refused too."""

import json

import pytest

from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import write_manifest
from gptopt.runtime import EdgeModel
from gptopt.runtime.folder import verify_folder

GENAI = {
    "model": {
        "type": "decoder", "vocab_size": 320, "context_length": 16,
        "decoder": {
            "session_options": {
                "log_id": "onnxruntime-genai", "provider_options": [{"cuda": {"graph": "1"}}],
            },
            "filename": "onnx/model.onnx",
            "inputs": {"past_key_names": "past_key_values.%d.key"},
        },
    },
    "search": {"max_length": 16, "temperature": 1.0, "do_sample": False},
}  # fmt: skip


def decoder(**changes):
    return lambda values: values["model"]["decoder"].update(changes)


def session(**changes):
    return lambda values: values["model"]["decoder"]["session_options"].update(changes)


def search(**changes):
    return lambda values: values["search"].update(changes)


HOSTILE = {
    "a graph outside": decoder(filename="../../secret.onnx"),
    "an absolute graph": decoder(filename="/etc/passwd"),
    "a graph of Windows": decoder(filename="C:\\model.onnx"),
    "a graph that is another file": decoder(filename="onnx/model_q4.onnx"),
    "a graph that is no name": decoder(filename=["onnx/model.onnx"]),
    "a graph reached in steps": decoder(filename="onnx/../onnx/model.onnx"),
    "another graph beside": lambda values: values["model"].update(
        embedding={"filename": "../embedding.onnx"}),
    "operators from a library": session(custom_ops_library="/tmp/evil.so"),
    "a provider's library": session(provider_options=[{"x": {"library": "\\\\host\\evil.dll"}}]),
    "a cache of engines elsewhere": session(provider_options=[{"trt": {"path": "../../engines"}}]),
    "an address": session(provider_options=[{"x": {"url": "https://example.org"}}]),
    "a name of another folder": decoder(inputs={"../input": "input_ids"}),
    "a line break": session(log_id="a\nb"),
    "a zero byte": session(log_id="a\0b"),
    "a word without an end": session(log_id="a" * 10_000),
    "a length that overflows": search(max_length=2**63),
    "a negative length": search(max_length=-(2**62)),
    "no number": search(temperature=float("nan")),
    "infinity": search(temperature=float("inf")),
}  # fmt: skip


def written(folder, values):
    (folder / "genai_config.json").write_text(json.dumps(values))
    write_manifest(folder, "edge")


def copied(values):
    return json.loads(json.dumps(values))


def refused(folder, message, error=CheckFailed):
    for use in (verify_folder, EdgeModel):
        with pytest.raises(error, match=message) as caught:
            use(folder)
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 1000


def test_a_plain_one_is_taken(folder):
    written(folder, GENAI)
    verify_folder(folder)
    EdgeModel(folder, threads=1)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_leads_elsewhere_is_refused(folder, change):
    values = copied(GENAI)
    change(values)
    written(folder, values)
    refused(folder, r"genai_config\.json: .* expected ")


@pytest.mark.parametrize("content", [b"[", b"[" * 100_000, b"\xff\xfe{}", b"[]"])
def test_what_is_no_object_is_refused(folder, content):
    (folder / "genai_config.json").write_bytes(content)
    write_manifest(folder, "edge")
    refused(folder, "genai_config.json", UserError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "custom_pipelines"])
def test_code_that_transformers_would_run_is_refused(folder, name, key):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {"AutoModel": "evil.Model"}}))
    write_manifest(folder, "edge")
    refused(folder, rf"{name}: names code to run \({key}\)")
