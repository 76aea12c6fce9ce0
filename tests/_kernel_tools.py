"""Random paged memory for kernel tests, poisoned wherever nothing was stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvtool.kernels.packed_attention import Blocks, Ring, paged
from kvtool.kernels.quantise import groups_of, packed_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Of :func:`rms_ratio`; bfloat16 has 8 bits, and weights are rounded to it as values are."""


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what was expected; 0 where both are zeros."""
    error = (found.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    return float(error / size) if size else float(error)


@dataclass
class Pages:
    """Planes of `[P, H, page, width]` in which the tokens of some rows lie, in no order.

    Attributes:
        lengths: `[B]` int32.
        table: `[B, pages]` int32; None where row b is page b.
    """

    lengths: Tensor
    table: Tensor | None
    page: int

    @classmethod
    def of(cls, lengths: Sequence[int], page: int | None) -> "Pages":
        """Where rows of these lengths lie; contiguous rows if `page` is None."""
        own = torch.tensor(lengths, dtype=torch.int32)
        if page is None:
            return cls(own.to(DEVICE), None, max(1, *lengths) + 3)
        pages = max(1, -(-max(lengths) // page))
        order = torch.randperm(len(lengths) * pages + 3)[: len(lengths) * pages]
        return cls(own.to(DEVICE), order.view(-1, pages).int().to(DEVICE), page)

    def plane(self, heads: int, width: int | None, dtype: torch.dtype) -> Tensor:
        """Random numbers where the tokens lie, NaN elsewhere; `[P, H, page]` if no width."""
        rows = len(self.lengths)
        count = rows if self.table is None else int(self.table.max()) + 1
        shape = (count, heads, self.page, *([] if width is None else [width]))
        plane = torch.full(shape, torch.nan, device=DEVICE)
        for b, length in enumerate(self.lengths.tolist()):
            for begin in range(0, length, self.page):
                page = b if self.table is None else int(self.table[b, begin // self.page])
                part = plane[page, :, : length - begin]
                part.copy_(torch.randn(part.shape))
        return plane.to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the device of the tests."""
    return torch.randn(shape).to(DEVICE, dtype)


def any_size() -> bool:
    """Whether kernels of every size come out right on the device of the tests."""
    from kvtool.kernels.tiles import has_sound_assembler  # here, as it imports Triton

    return has_sound_assembler(torch.device(DEVICE))


def needs_any_size() -> None:
    """Skips a size that an old assembler is known to get wrong."""
    if not any_size():
        pytest.skip("a ptxas before 12.9 gets kernels of this size wrong")


def packed_memory(
    keys: int, values: int, *, size: int = 64, width: int = 64, heads: int = 2, sink: int = 4,
    window: int = 20, lengths: tuple[int, ...] = (0, 1, 7, 100, 217),
    dtype: torch.dtype = torch.float32, clips: tuple[float, float] = (1.0, 1.0),
) -> tuple[Ring, Blocks, torch.Tensor]:  # fmt: skip
    """Rings full of numbers, NaN where nobody wrote, and blocks of everything that is due."""
    rows, each = len(lengths), paged.PAGE // size
    pages = rows * (-(-max(lengths) // paged.PAGE) + 1)
    table = (torch.randperm(pages) + 1).view(rows, -1).int().to(DEVICE)
    shape = (pages + 1, heads, each)
    groups = groups_of(width, size)

    def scales(*more: int) -> torch.Tensor:
        return torch.full((*shape, *more, 2), torch.nan, dtype=torch.float16, device=DEVICE)

    def codes(*more: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, *more), dtype=torch.uint8).to(DEVICE)

    blocks = Blocks(
        codes(width, packed_bytes(size, keys)), scales(width, 1),
        codes(size, packed_bytes(width, values)), scales(size, groups),
        table, keys, values, *clips,
    )  # fmt: skip
    empty = torch.full((rows + 2, heads, sink + window + size, width), torch.nan, device=DEVICE)
    ring = Ring(
        empty.to(dtype),
        empty.to(dtype, copy=True),
        torch.randperm(rows + 2)[:rows].to(DEVICE),
        sink,
        window,
    )
    for length in range(1, max(lengths) + 1):
        for b, n in enumerate(lengths):
            if length <= n:
                at = length - 1
                slot = at if at < sink else sink + (at - sink) % (window + size)
                for plane in (ring.keys, ring.values):
                    new = torch.randn(heads, width) * (5 if at % 50 == 3 else 1)
                    plane[ring.rows[b], :, slot] = new.to(DEVICE, dtype)
        due = torch.tensor([min(length, n) if length <= n else 0 for n in lengths])
        paged.pack_blocks(ring, blocks, due.int().to(DEVICE))
    return ring, blocks, torch.tensor(lengths).int().to(DEVICE)
