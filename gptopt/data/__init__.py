"""Text, jsonl and parquet to token shards, and shards to batches whose position can be saved."""

from gptopt.data.masking import IGNORED, Masking
from gptopt.data.mixture import Mixture
from gptopt.data.prepare import open_dataset, tokenize
from gptopt.data.sampler import ItemSampler, Sampler
from gptopt.data.shards import Dataset, TokenSplit

__all__ = [
    "IGNORED",
    "Dataset",
    "ItemSampler",
    "Masking",
    "Mixture",
    "Sampler",
    "TokenSplit",
    "open_dataset",
    "tokenize",
]
