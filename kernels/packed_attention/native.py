"""The decode step over packed heads in C; see `cpu.c`, and for the contract `paged.py`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kvtool.kernels.native import DTYPES, PART, address, learns, library, use_native
from kvtool.kernels.packed_attention.paged import PAGE, WIDEST, Blocks, Ring, packed_blocks


class _Call(ctypes.Structure):  # as in cpu.c
    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "group", "width")),
        *((name, c_int64) for name in ("size", "key_bits", "value_bits", "each", "columns")),
        *((name, c_int64) for name in ("turned", "sink", "window", "room", "dtype")),
        *((name, c_int64) for name in ("most", "threads")),
        *((name, c_void_p) for name in ("q", "ring_keys", "ring_values", "ring_rows")),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, c_void_p) for name in ("table", "lengths", "sink_logits", "parts", "out")),
        ("scaling", c_float),
    )


def fits(q: Tensor, ring: Ring, blocks: Blocks, sink_logits: Tensor | None = None) -> bool:
    """Whether the kernel reads these."""
    exact, width = (ring.keys, ring.values), q.shape[-1]
    lie = all(x.is_contiguous() and x.shape == ring.keys.shape for x in exact)
    known = q.dtype in DTYPES and ring.keys.dtype == ring.values.dtype
    sized = width == ring.keys.shape[-1] and fits_sizes(width, blocks.size, ring.keys.dtype)
    return lie and known and sized and not learns(q, *exact, sink_logits) and use_native(q, *exact)


def fits_sizes(width: int, size: int, dtype: torch.dtype) -> bool:
    """Whether it reads heads of this width and dtype in blocks of N = `size` tokens.

    N is a multiple of what a vector holds, which groups of channels begin with.
    """
    sized = width <= WIDEST and size <= PAGE
    return sized and width % 8 == 0 and size % 16 == 0 and dtype in DTYPES


def packed_attention(
    q: Tensor,
    ring: Ring,
    blocks: Blocks,
    lengths: Tensor,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """See `paged.py`."""
    (rows, queries, width), heads, size = q.shape, ring.keys.shape[1], blocks.size
    assert len(lengths) == len(ring.rows) == len(blocks.table) == rows
    keys, key_scales, values, value_scales = blocks.planes
    exact, packed = 0, 0
    for length in lengths.tolist():
        own = packed_blocks(length, ring, size)
        exact, packed = max(exact, length - own * size), max(packed, own)
    most = -(-exact // PART) + -(-packed // (PART // size))
    group, asked = queries // heads, q.float().contiguous()
    parts = asked.new_empty(rows * heads * most * group * (2 + width))
    out = torch.empty_like(asked)
    own_rows, table, counts = ring.rows.long(), blocks.table.int(), lengths.int()
    logits = None if sink_logits is None else sink_logits.float().contiguous()
    call = _Call(
        rows=rows,
        heads=heads,
        group=group,
        width=width,
        size=size,
        key_bits=blocks.key_bits,
        value_bits=blocks.value_bits,
        each=keys.shape[2],
        columns=table.shape[1],
        turned=blocks.turned,
        sink=ring.sink,
        window=ring.window,
        room=ring.keys.shape[2],
        dtype=DTYPES[ring.keys.dtype],
        most=most,
        threads=torch.get_num_threads(),
        q=address(asked),
        ring_keys=address(ring.keys),
        ring_values=address(ring.values),
        ring_rows=address(own_rows),
        keys=address(keys),
        values=address(values),
        key_scales=address(key_scales),
        value_scales=address(value_scales),
        table=address(table),
        lengths=address(counts),
        sink_logits=address(logits),
        parts=address(parts),
        out=address(out),
        scaling=scaling,
    )
    library().packed_attention(ctypes.byref(call))
    return out.to(q.dtype)
