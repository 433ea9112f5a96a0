"""Who `gptopt bench inference` measures, each in a process, and if need be a Python, of its own.

The files here are run by path in environments that have no gptopt: they import the standard
library, numpy and the one package they stand for. A peer is a class:

    Peer(model: Path, variant: str, threads: int)
        version: str, disk_bytes: int, cache_bytes: int (of one number in the cache)
        generate(ids (B, T) int64, new) -> tokens (B, new), stamps: the begin, then each token's end

and a function `prepare(source, out, variant)` that makes its model from a Hugging Face folder.
Greedy, exactly `new` tokens: none of them ends early.
"""
