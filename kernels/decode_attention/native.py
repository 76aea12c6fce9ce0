"""Decode attention in C; see `cpu.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.kernels.native import (
    DTYPES,
    E4M3,
    PART,
    WIDEST,
    address,
    learns,
    library,
    use_native,
)


class Run(NamedTuple):
    """Some tokens of a row, which all its queries read.

    Attributes:
        keys, values: `[H, capacity, D]`, lines without gaps, or with `starts` `[S, D]`, of one
            float dtype; bytes hold e4m3.
        length: Tokens of each head; of heads behind each other, of the longest.
        starts: `[H + 1]` int64, where heads begin that lie behind each other.
        scales: `[H]` fp32 each, what keys and values are multiplied by.
    """

    keys: Tensor
    values: Tensor
    length: int
    starts: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None


class _Run(ctypes.Structure):  # as in cpu.c
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "starts")),
        *((name, c_int64) for name in ("stride", "length", "dtype")),
        *((name, c_void_p) for name in ("key_scales", "value_scales")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "group", "width")),
        *((name, c_int64) for name in ("runs", "most", "threads")),
        *((name, c_void_p) for name in ("q", "read", "sink_logits", "parts", "out")),
        ("scaling", c_float),
    )


def fits(q: Tensor, keys: Tensor, values: Tensor, *, e4m3: bool = False) -> bool:
    """Whether the kernel reads such keys and values, `[..., H, ·, D]`.

    Args:
        e4m3: Whether they are bytes.
    """
    width = q.shape[-1]
    alike = keys.dtype == values.dtype and keys.shape == values.shape
    known = (keys.dtype == torch.uint8) if e4m3 else (keys.dtype in DTYPES)
    lie = all(x.stride()[-2:] == (width, 1) for x in (keys, values)) and width <= WIDEST
    same = keys.dim() < 3 or keys.stride(-3) == values.stride(-3)
    fine = alike and known and lie and same and q.dtype in DTYPES
    return fine and not learns(q, keys, values) and use_native(q, keys, values)


def decode_runs(
    q: Tensor,
    read: Sequence[Sequence[Run]],
    heads: int,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query per row and head over all tokens of its runs.

    Args:
        q: `[B, Q, D]`, rotated.
        read: As many runs of each row.
        heads: H, of keys and values.
        scaling: Factor on the scores.
        sink_logits: `[Q]`, a logit of each head that joins the softmax (`kernels/sink_logits`).

    Returns:
        `[B, Q, D]`; zeros of rows without a token.
    """
    rows, queries, width = q.shape
    assert len(read) == rows
    assert queries % heads == 0
    assert all(len(runs) == len(read[0]) for runs in read)
    most = max(sum(-(-run.length // PART) for run in runs) for runs in read)
    group, asked = queries // heads, q.float().contiguous()
    parts = asked.new_empty(rows * heads * most * group * (2 + width))
    out = torch.empty_like(asked)
    logits = None if sink_logits is None else sink_logits.float().contiguous()
    runs = (_Run * (rows * len(read[0])))(*(_of(run) for runs in read for run in runs))
    call = _Call(
        rows=rows,
        heads=heads,
        group=group,
        width=width,
        runs=len(read[0]),
        most=most,
        threads=torch.get_num_threads(),
        q=address(asked),
        read=ctypes.addressof(runs),
        sink_logits=address(logits),
        parts=address(parts),
        out=address(out),
        scaling=scaling,
    )
    library().decode_attention(ctypes.byref(call))
    return out.to(q.dtype)


def _of(run: Run) -> _Run:
    keys, values, length, starts, scales = run
    width = keys.shape[-1]
    assert keys.stride()[-2:] == values.stride()[-2:] == (width, 1)
    assert keys.stride(0) == values.stride(0)
    assert length <= keys.shape[-2]
    assert scales is None or all(x.dtype == torch.float32 and x.is_contiguous() for x in scales)
    dtype = E4M3 if keys.dtype == torch.uint8 else DTYPES[keys.dtype]
    by = (None, None) if scales is None else [address(x) for x in scales]
    return _Run(
        keys.data_ptr(), values.data_ptr(), address(starts), keys.stride(0) // width, length,
        dtype, *by,
    )  # fmt: skip
