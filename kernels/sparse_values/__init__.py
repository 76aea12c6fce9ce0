"""The largest numbers of each token, exactly, behind a bitmap that says where they belong."""

from kvtool.kernels.sparse_values.reference import (
    bitmap_bytes,
    compress,
    decompress,
    sparse_bytes,
    sparse_sums,
)

__all__ = ["bitmap_bytes", "compress", "decompress", "sparse_bytes", "sparse_sums"]
