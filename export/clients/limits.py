"""What clients are known not to do, each with the words by which they say so.

A failure that says something else is a fault; so is one that nothing here expects.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """A known limit of a client.

    Attributes:
        name: as it stands in tests/clients_matrix.toml.
        client: who has it; None: every one, for it is the file's.
        evidence: what the client's error holds, all of it.
        cases: where it shows.
        reason: for whoever meets it.
    """

    name: str
    client: str | None
    evidence: tuple[str, ...]
    cases: tuple[str, ...]
    reason: str


RIGHT_ONLY = "its rows are padded on the right only"  # the one that check.py finds itself
_EVERY = ("greedy", "left padding", "right padding", "text")
_TJS, _TJS_WEB, _TJS_GPU = "transformers.js", "transformers.js-web", "transformers.js-webgpu"
LIMITS = (
    Limit(
        "one row", "openvino", ("Reshape", "inputProduct == outputProduct"), _EVERY[1:3],
        "runs GroupQueryAttention for one row at a time; use --target standard-growing for batches",
    ),
    Limit(
        "no softcap", "openvino", ("GroupQueryAttention: softcap is not supported",), _EVERY,
        "converts no GroupQueryAttention with attn_softcap; use --target standard-growing",
    ),
    Limit(
        "no zero points in look-ups", "openvino",
        ("ConvertGatherToGatherCompressed", "constant != nullptr"), _EVERY,
        "reads no GatherBlockQuantized with zero points, as q4's table has; use --target web",
    ),
    Limit(
        "no quantised embedding", _TJS_WEB,
        ("Could not find an implementation for GatherBlockQuantized",), _EVERY,
        "onnxruntime-web's build with WebGPU, which transformers.js always loads, has no kernel of "
        "GatherBlockQuantized for WebAssembly; use --target web",
    ),
    *(
        Limit(
            "no float16 on the GPU", client, ("requires f16 but the device does not support it",),
            (*_EVERY, "masked"),
            "this GPU, or the software in its place, has no shader-f16; use --precision fp32 or q4",
        )
        for client in ("onnxruntime-webgpu", _TJS_GPU)
    ),
    *(
        Limit(
            "no masked models", client, ("Unsupported model type:",), ("masked",),
            "knows no masked language model of this type; run the graph with onnxruntime there",
        )
        for client in (_TJS, _TJS_WEB, _TJS_GPU)
    ),
    Limit(
        "no masked models", "genai", ("Model package support requires",), ("masked",),
        "runs causal models only, so their folder has no genai_config.json",
    ),
    Limit(
        "no positions", "optimum", ("Input position_ids is required by model but not provided",),
        ("masked",),
        "feeds no position_ids to masked language models; use its ORTModelForCustomTasks",
    ),
    *(
        Limit(
            "no static cache", client, ("TensorScatter", "exceeds max_sequence_length (0)"), _EVERY,
            "lets every cache grow from nothing; use --target standard-growing",
        )
        for client in ("optimum", _TJS, _TJS_WEB)
    ),
    Limit(
        "no TensorScatter", "openvino", ("No conversion rule", "TensorScatter"), _EVERY,
        "converts no TensorScatter; use --target standard-growing",
    ),
    Limit(
        "right padding only", None, (RIGHT_ONLY,), _EVERY[1:2],
        "a file of --target ort-cpu or ort-cuda reads rows padded on the left wrongly; use "
        "--target portable for batches",
    ),
)  # fmt: skip


def known_limit(client: str, case: str, error: str) -> Limit | None:
    """The limit that an error is an instance of, or None."""
    for limit in LIMITS:
        fits = limit.client in (client, None) and case in limit.cases
        if fits and all(words in error for words in limit.evidence):
            return limit
    return None
