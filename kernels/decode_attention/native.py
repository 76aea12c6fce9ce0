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
        keys, values: `[H, capacity, D and Dv]`, or with `starts` `[S, ...]`, of one float dtype;
            bytes hold e4m3. Values may be a part of the keys.
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
        *((name, c_int64) for name in ("key_head", "value_head", "key_line", "value_line")),
        *((name, c_int64) for name in ("length", "dtype")),
        *((name, c_void_p) for name in ("key_scales", "value_scales")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "group", "key_width", "value_width")),
        *((name, c_int64) for name in ("runs", "most", "threads")),
        *((name, c_void_p) for name in ("q", "read", "sink_logits", "beside", "weight")),
        *((name, c_void_p) for name in ("parts", "out", "masses")),
        ("scaling", c_float),
    )


def fits(q: Tensor, keys: Tensor, values: Tensor, *, e4m3: bool = False) -> bool:
    """Whether the kernel reads such keys and values, `[..., H, ·, D]`.

    Args:
        e4m3: Whether they are bytes.
    """
    alike = keys.dtype == values.dtype and keys.shape[:-1] == values.shape[:-1]
    known = (keys.dtype == torch.uint8) if e4m3 else (keys.dtype in DTYPES)
    narrow = q.shape[-1] == keys.shape[-1] and max(keys.shape[-1], values.shape[-1]) <= WIDEST
    lie = keys.stride(-1) == values.stride(-1) == 1
    fine = alike and known and narrow and lie and q.dtype in DTYPES
    return fine and not learns(q, keys, values) and use_native(q, keys, values)


def decode_runs(
    q: Tensor,
    read: Sequence[Sequence[Run]],
    heads: int,
    scaling: float,
    sink_logits: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row and head over all tokens of its runs.

    Args:
        q: `[B, Q, D]`, rotated.
        read: As many runs of each row.
        heads: H, of keys and values.
        scaling: Factor on the scores.
        sink_logits: `[Q]`, a logit of each head that joins the softmax (`kernels/sink_logits`).
        beside: What this returned for other tokens, which join the softmax, too.

    Returns:
        `[B, Q, Dv]`; zeros of rows without a token. And `[B, Q]` fp32, the log-sum-exp of scores.
    """
    rows, queries, width = q.shape
    value_width = read[0][0].values.shape[-1]
    assert len(read) == rows
    assert queries % heads == 0
    assert all(len(runs) == len(read[0]) for runs in read)
    assert all(run.keys.shape[-1] == width for runs in read for run in runs)
    assert all(run.values.shape[-1] == value_width for runs in read for run in runs)
    most = max(sum(-(-run.length // PART) for run in runs) for runs in read)
    group, asked = queries // heads, q.float().contiguous()
    parts = asked.new_empty(rows * heads * most * group * (2 + value_width))
    out, masses = asked.new_empty((rows, queries, value_width)), asked.new_empty((rows, queries))
    logits = None if sink_logits is None else sink_logits.float().contiguous()
    other, weight = (None, None) if beside is None else (x.float().contiguous() for x in beside)
    assert other is None or other.shape == out.shape
    runs = (_Run * (rows * len(read[0])))(*(_of(run) for runs in read for run in runs))
    call = _Call(
        rows=rows,
        heads=heads,
        group=group,
        key_width=width,
        value_width=value_width,
        runs=len(read[0]),
        most=most,
        threads=torch.get_num_threads(),
        q=address(asked),
        read=ctypes.addressof(runs),
        sink_logits=address(logits),
        beside=address(other),
        weight=address(weight),
        parts=address(parts),
        out=address(out),
        masses=address(masses),
        scaling=scaling,
    )
    library().decode_attention(ctypes.byref(call))
    return out.to(q.dtype), masses


def _of(run: Run) -> _Run:
    keys, values, length, starts, scales = run
    assert keys.stride(-1) == values.stride(-1) == 1
    assert length <= min(keys.shape[-2], values.shape[-2])
    assert scales is None or all(x.dtype == torch.float32 and x.is_contiguous() for x in scales)
    dtype = E4M3 if keys.dtype == torch.uint8 else DTYPES[keys.dtype]
    by = (None, None) if scales is None else [address(x) for x in scales]
    heads = (0, 0) if starts is not None else (keys.stride(0), values.stride(0))
    return _Run(
        keys.data_ptr(), values.data_ptr(), address(starts), *heads,
        keys.stride(-2), values.stride(-2), length, dtype, *by,
    )  # fmt: skip
