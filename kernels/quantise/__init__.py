"""Few bits per number: groups of channels of a token share a scale and a minimum."""

from kvtool.kernels.quantise.reference import (
    BITS,
    dequantise,
    dequantise_rows,
    fake_quantise,
    groups_of,
    packed_bytes,
    quantise,
    quantise_rows,
    unpack,
)

__all__ = [
    "BITS",
    "dequantise",
    "dequantise_rows",
    "fake_quantise",
    "groups_of",
    "packed_bytes",
    "quantise",
    "quantise_rows",
    "unpack",
]
