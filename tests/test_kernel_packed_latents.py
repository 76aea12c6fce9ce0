"""A decode step over packed latents in shared pages: Triton against plain torch."""

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, rms_ratio

from kvtool.kernels.packed_attention import Ring
from kvtool.kernels.packed_attention.paged import PAGE
from kvtool.kernels.packed_latents import Blocks, fits, reference
from kvtool.kernels.quantise import BITS, packed_bytes

pytest.importorskip("triton")

kernel = pytest.importorskip("kvtool.kernels.packed_latents.triton")

LENGTHS = (0, 1, 7, 100, 217)


def memory(
    bits: tuple[int, ...], rank: int, rope: int, *, size: int = 64, sink: int = 4, window: int = 20,
    lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float32,
) -> tuple[Ring, Blocks, torch.Tensor]:  # fmt: skip
    """Rings full of numbers, NaN where nobody wrote, and blocks of everything that is due.

    Every number has one of `bits`, drawn.
    """
    rows, each, width = len(lengths), PAGE // size, rank + rope
    pages = rows * (-(-max(lengths) // PAGE) + 1)
    table = (torch.randperm(pages) + 1).view(rows, -1).int().to(DEVICE)
    drawn = torch.tensor(bits)[torch.randint(len(bits), (width,))].tolist()
    drawn[: len(bits)] = bits  # all of them occur
    present = tuple(sorted(set(drawn)))
    planes = [(pages + 1, 1, each, drawn.count(b)) for b in present]
    blocks = Blocks(
        tuple(
            torch.randint(0, 256, (*shape, packed_bytes(size, b)), dtype=torch.uint8).to(DEVICE)
            for b, shape in zip(present, planes, strict=True)
        ),
        tuple(
            torch.full((*shape, 1, 2), torch.nan, dtype=torch.float16, device=DEVICE)
            for shape in planes
        ),
        present,
        tuple(drawn[:rank].count(b) for b in present),
        table,
    )
    latents = torch.full((rows + 2, 1, sink + window + size, width), torch.nan, device=DEVICE)
    latents = latents.to(dtype)
    own = torch.randperm(rows + 2)[:rows].to(DEVICE)
    ring = Ring(latents, latents[..., :rank], own, sink, window)
    for length in range(1, max(lengths) + 1):
        at = length - 1
        slot = at if at < sink else sink + (at - sink) % (window + size)
        for b, n in enumerate(lengths):
            if length <= n:
                new = torch.randn(width) * (5 if at % 50 == 3 else 1)
                latents[own[b], 0, slot] = new.to(DEVICE, dtype)
        due = torch.tensor([length if length <= n else 0 for n in lengths])
        reference.pack_latents(ring, blocks, due.int().to(DEVICE))
    return ring, blocks, torch.tensor(lengths).int().to(DEVICE)


def both(ring, blocks, lengths, queries, dtype=torch.float32):
    """What the kernel finds, and what it should."""
    q = torch.randn(len(lengths), queries, ring.keys.shape[-1]).to(DEVICE, dtype)
    run = (q, ring, blocks, lengths, 0.1)
    return kernel.packed_latent_attention(*run), reference.packed_latent_attention(*run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(2,), (3,), (4,), (8,), (2, 4), (3, 8), BITS])
def test_attention_is_that_over_what_was_stored(bits, dtype, poison):
    ring, blocks, lengths = memory(bits, 40, 16, dtype=dtype)
    found, expected = both(ring, blocks, lengths, 6, dtype)
    assert found.dtype == dtype
    assert found.shape == (len(lengths), 6, 40)
    assert not found[0].any()
    # Queries are rounded once more than in other kernels, with their scales.
    assert rms_ratio(found, expected) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rank", "rope", "size", "queries", "bits"),
    [(144, 32, 64, 9, BITS), (144, 32, 64, 9, (4,)), (8, 2, 16, 3, (2, 3)), (64, 16, 32, 40, (4,)),
     (33, 1, 16, 1, (8, 2)), (20, 0, 32, 2, (3, 4))],
)  # fmt: skip
def test_sizes(rank, rope, size, queries, bits):
    assert fits(rank, size)
    ring, blocks, lengths = memory(bits, rank, rope, size=size, lengths=(90, 200))
    found, expected = both(ring, blocks, lengths, queries)
    assert rms_ratio(found, expected) < 1e-5


def test_sizes_without_a_kernel():
    assert not fits(512, 128)  # a block is longer than a page
    assert not fits(513, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), [((2,), 64), ((4,), 16), (BITS, 64), (BITS, 32)])
def test_blocks_are_packed_as_by_plain_torch(bits, size, dtype):
    due = (24 + size, 24 + 3 * size, 23 + size, 5)  # the first two have just made one complete
    ring, blocks, lengths = memory(bits, 70, 21, size=size, lengths=due, dtype=dtype)
    planes = (*blocks.codes, *blocks.scales)
    copies = [plane.clone() for plane in planes]
    for plane in planes:
        for row, block in ((0, 0), (1, 2)):
            page, within = blocks.at(row, block)
            plane[page, 0, within] = 0 if plane.dtype == torch.uint8 else torch.nan
    kernel.pack_latents(ring, blocks, lengths)
    for plane, copy in zip(planes, copies, strict=True):
        assert torch.equal(plane.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_not_a_number_reaches_the_reader():
    ring, blocks, lengths = memory((4,), 20, 4, lengths=(88,))
    ring.keys[ring.rows[0], 0, 10, 5] = torch.nan
    kernel.pack_latents(ring, blocks, lengths)
    page, within = blocks.at(0, 0)
    broken = blocks.scales[0][page, 0, within].isnan().any(dim=-1)  # [R, 1]
    assert broken[:, 0].nonzero().tolist() == [[5]]
    q = torch.ones(1, 2, 24, device=DEVICE)
    assert kernel.packed_latent_attention(q, ring, blocks, lengths, 0.125).isnan().any()


@pytest.mark.parametrize(("items", "heads"), [(1, 16), (3, 64), (50, 32)])
def test_how_work_is_cut_does_not_matter(monkeypatch, items, heads):
    ring, blocks, lengths = memory((2, 4), 40, 16)
    config = kernel.config_for(20, 64, 4, True)._replace(items=items, least=1, heads=heads)
    monkeypatch.setattr(kernel, "config_for", lambda *_: config)
    found, expected = both(ring, blocks, lengths, 20)
    assert rms_ratio(found, expected) < 1e-5


def test_lengths_around_a_block_and_a_page():
    """The last token before a block, the one that completes it, the next; where pages begin."""
    lengths = (23, 24, 25, 55, 56, 57, 64, 65, 87, 88, 89)
    ring, blocks, lengths = memory((3, 4), 20, 8, size=32, lengths=lengths)
    found, expected = both(ring, blocks, lengths, 3)
    for row in range(len(lengths)):
        assert rms_ratio(found[row], expected[row]) < 1e-5
