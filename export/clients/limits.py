"""What clients are known not to do, each with the words by which they say so.

A failure that says something else is a fault; so is one that nothing here expects.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """A known limit of a client.

    Attributes:
        name: as it stands in tests/clients_matrix.toml.
        client: who has it.
        evidence: what the client's error holds, all of it.
        cases: where it shows.
        reason: for whoever meets it.
    """

    name: str
    client: str
    evidence: tuple[str, ...]
    cases: tuple[str, ...]
    reason: str


_EVERY = ("greedy", "left padding", "right padding", "text")
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
        "no quantised embedding", "transformers.js-web",
        ("Could not find an implementation for GatherBlockQuantized",), _EVERY,
        "onnxruntime-web's build with WebGPU, which transformers.js always loads, has no kernel of "
        "GatherBlockQuantized for WebAssembly; use --precision fp32 or fp16 there",
    ),
)  # fmt: skip


def known_limit(client: str, case: str, error: str) -> Limit | None:
    """The limit that an error is an instance of, or None."""
    for limit in LIMITS:
        fits = limit.client == client and case in limit.cases
        if fits and all(words in error for words in limit.evidence):
            return limit
    return None
