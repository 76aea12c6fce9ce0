"""Decode attention in C; see `cpu.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.kernels.native import DTYPES, PART, address, library, use_native

WIDEST = 512
"""Numbers of a head."""


class Run(NamedTuple):
    """Some tokens of a row, which all its queries read.

    Attributes:
        keys, values: `[H, capacity, D]`, lines without gaps, or with `starts` `[S, D]`; bytes hold
            e4m3.
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
        *((name, c_int64) for name in ("rows", "heads", "group", "width", "runs", "most")),
        *((name, c_void_p) for name in ("q", "read", "sink_logits", "parts", "out")),
        ("scaling", c_float),
    )


def fits(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel reads such keys and values, `[..., H, ·, D]`."""
    alike = keys.dtype == values.dtype and keys.shape == values.shape
    known = keys.dtype in DTYPES and q.dtype in DTYPES and keys.shape[-1] <= WIDEST
    learns = torch.is_grad_enabled() and q.requires_grad
    return alike and known and not learns and use_native(q, keys)


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
        q=address(asked),
        read=ctypes.addressof(runs),
        sink_logits=address(logits),
        parts=address(parts),
        out=address(out),
        scaling=scaling,
    )
    library("decode_attention").decode_attention(ctypes.byref(call))
    return out.to(q.dtype)


def _of(run: Run) -> _Run:
    keys, values, length, starts, scales = run
    width = keys.shape[-1]
    assert keys.stride()[-2:] == values.stride()[-2:] == (width, 1)
    assert keys.stride(0) == values.stride(0)
    by = (None, None) if scales is None else [address(x) for x in scales]
    return _Run(
        keys.data_ptr(), values.data_ptr(), address(starts), keys.stride(0) // width, length,
        DTYPES[keys.dtype], *by,
    )  # fmt: skip
