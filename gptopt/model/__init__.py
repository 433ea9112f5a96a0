"""The reference GPT, to be read top to bottom: embeddings.py, block.py, gpt.py.

Sizes, in code and docstrings: B batch, T new tokens, P tokens in the cache, S = P + T, C channels
(n_embd), H query heads, K key/value heads, D head dim, F ffn width, V vocabulary.
"""

from gptopt.model.block import Block, Cache, Norm
from gptopt.model.classifier import Classifier, as_classifier, model_of
from gptopt.model.gpt import GPT, ModelOutput

__all__ = [
    "GPT",
    "Block",
    "Cache",
    "Classifier",
    "ModelOutput",
    "Norm",
    "as_classifier",
    "model_of",
]
