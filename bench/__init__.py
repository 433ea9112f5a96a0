"""How fast, against whom, and how far from the limit. Contenders are interleaved in one run."""
