"""One new query that reads few of the cached tokens, chosen by a few channels of their keys."""

from kvtool.kernels.sparse_reading.reference import choose, sparse_attention

__all__ = ["choose", "sparse_attention"]
