"""Asymmetric integers of 2, 3, 4 or 8 bits per token, in plain torch: the contract.

A group is G consecutive channels of one token (KIVI's values, arXiv 2402.02750, section 3). With
its minimum m and scale s

    code = round((x - m) / s),     x̂ = m + s · code,     |x - x̂| <= s / 2.

m and s are stored as fp16, m rounded down and s up, so that the largest code reaches the group's
maximum: the bound holds for the stored numbers. A group whose numbers are all equal to an fp16
number has s = 0 and comes back exactly.

What fp16 does not hold is stored as ±65504. A NaN makes all of its group NaN when it is read.

Packing is planar: of W channels byte c holds c, c + N, c + 2 N, ... with N = ⌈W b / 8⌉ bytes, low
bits first, so that unpacking with one shift gives N consecutive channels. Codes of 3 bits are two
such planes, of their lower two bits and of the third: no code crosses a byte.

Keys with a scale per channel (KIVI, section 3.1) are the same with tokens in the place of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
"""Widths of a code."""

_LARGEST = 65504.0  # of fp16


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of `width` codes."""
    if bits == 3:
        return packed_bytes(width, 2) + packed_bytes(width, 1)
    return -(-width * bits // 8)


def groups_of(width: int, group: int) -> int:
    """Groups of `width` channels; the last may have fewer than the others."""
    return -(-width // group)


def quantise(x: Tensor, bits: int, group: int = 32, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Packs numbers.

    Args:
        x: `[..., W]`, any float dtype.
        bits: One of :data:`BITS`.
        group: G.
        clip: Share of a group's range, about its middle, that codes are spread over. Below 1 the
            few numbers outside are stored as its ends, and all others with smaller errors.

    Returns:
        Codes, uint8 `[..., ⌈W b / 8⌉]`; and fp16 `[..., groups, 2]`: scale, minimum.
    """
    codes, scales = _codes(x, bits, group, clip)
    return _pack(codes, bits), scales


def dequantise(packed: Tensor, scales: Tensor, width: int, bits: int, group: int = 32) -> Tensor:
    """What :func:`quantise` packed of W = `width` channels, fp32 `[..., W]`."""
    return _numbers(unpack(packed, width, bits), scales, group)


def quantise_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packs rows about zero, of any size that fp32 holds.

    A row has one scale s, stored as bf16, whose range is that of fp32, and never rounded down: with
    M = 2^(b-1) - 1 and s >= max |x| / M, code = round(x / s) + M + 1 and |x - x̂| <= s / 2. A row of
    zeros has s = 0.

    Args:
        x: `[..., W]`.

    Returns:
        Codes, uint8 `[..., ⌈W b / 8⌉]`; scales, bf16 `[...]`.
    """
    top = 2 ** (bits - 1) - 1
    x = x.float()
    wanted = _quotient(x.abs().amax(dim=-1), top)
    scale = wanted.bfloat16()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() < wanted, above, scale)
    s = scale.float()[..., None]
    codes = (x / torch.where(s == 0, 1.0, s)).round_().clamp_(-top, top) + (top + 1)
    return _pack(codes.to(torch.uint8), bits), scale


def dequantise_rows(packed: Tensor, scales: Tensor, width: int, bits: int) -> Tensor:
    """What :func:`quantise_rows` packed of W = `width` numbers, fp32 `[..., W]`."""
    codes = unpack(packed, width, bits).float() - 2 ** (bits - 1)
    read: Tensor = codes * scales.float()[..., None]
    return read


def unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    """The codes themselves, uint8 `[..., W]`: without scale and minimum."""
    if bits == 3:
        low, high = packed.split([packed_bytes(width, 2), packed_bytes(width, 1)], dim=-1)
        return unpack(low, width, 2) | (unpack(high, width, 1) << 2)
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(fields, dim=-1)[..., :width]


def fake_quantise(x: Tensor, bits: int, group: int = 32, clip: float = 1.0) -> Tensor:
    """What `x` is read as when it has been stored; for training.

    x̂ = x + s e with the rounding errors e, |e| <= ½, for fixed: the gradient passes straight
    through, and the scale s, which is as large as the range of a group, feels what its errors cost.

    Returns:
        `[..., W]`, in the dtype of `x`; the very numbers of :func:`dequantise`, rounded to it.
    """
    grouped = _grouped(x, group)
    scale = clip * (grouped.amax(dim=-1) - grouped.amin(dim=-1)) / (2**bits - 1)
    scale = _per_channel(scale, x.shape[-1], group)
    with torch.no_grad():
        codes, scales = _codes(x, bits, group, clip)
        read = _numbers(codes, scales, group).to(x.dtype)
        error = torch.where(scale == 0, 0.0, (read - x) / scale)
    moved: Tensor = x + error * scale
    return read + (moved - moved.detach())


def _codes(x: Tensor, bits: int, group: int, clip: float) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[..., W]`, not packed; fp16 `[..., groups, 2]`."""
    width, top = x.shape[-1], 2**bits - 1
    x = x.float().clamp(-_LARGEST, _LARGEST)
    grouped = _grouped(x, group)
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    cut = (1 - clip) / 2 * (high - low)
    minimum = _rounded(low + cut, down=True)
    scale = _rounded(_quotient(high - cut - minimum.float(), top), down=False)
    m, s = (_per_channel(y.float(), width, group) for y in (minimum, scale))
    codes = ((x - m) / torch.where(s == 0, 1.0, s)).round_().clamp_(0, top).nan_to_num_(0.0)
    return codes.to(torch.uint8), torch.stack((scale, minimum), dim=-1)


def _numbers(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    width = codes.shape[-1]
    scale, minimum = (_per_channel(y.float(), width, group) for y in scales.unbind(dim=-1))
    return codes * scale + minimum


def _grouped(x: Tensor, group: int) -> Tensor:
    """`[..., W]` to `[..., groups, G]`; the last channel fills up the last group."""
    missing = groups_of(x.shape[-1], group) * group - x.shape[-1]
    filled = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
    grouped: Tensor = filled.unflatten(-1, (-1, group))
    return grouped


def _per_channel(x: Tensor, width: int, group: int) -> Tensor:
    """`[..., groups]` to `[..., W]`."""
    return x.repeat_interleave(group, dim=-1)[..., :width]


def _quotient(x: Tensor, divisor: int) -> Tensor:
    """x / n, rounded once, on every device.

    By a number of the host torch does not divide on CUDA: it multiplies by the reciprocal, and what
    comes out an ulp too large is rounded up to the next scale.
    """
    return x / x.new_full((), divisor)


def _rounded(x: Tensor, *, down: bool) -> Tensor:
    """To fp16, never up or never down."""
    near = x.half()
    beyond = near.float() > x if down else near.float() < x
    there = torch.full_like(near, -_LARGEST if down else _LARGEST)
    return torch.where(beyond, torch.nextafter(near, there), near)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 3:
        return torch.cat((_pack(codes & 3, 2), _pack(codes >> 2, 1)), dim=-1)
    fields, size = 8 // bits, packed_bytes(codes.shape[-1], bits)
    missing = codes.new_zeros(*codes.shape[:-1], fields * size - codes.shape[-1])
    planes = torch.cat((codes, missing), dim=-1).unflatten(-1, (fields, size))
    packed: Tensor = planes[..., 0, :].clone()
    for field in range(1, fields):
        packed |= planes[..., field, :] << (bits * field)
    return packed
