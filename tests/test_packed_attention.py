"""A decode step over packed heads in shared pages: Triton against plain torch."""

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, packed_memory, rms_ratio

from kvtool.kernels.packed_attention import fits, paged

pytest.importorskip("triton")

kernel = pytest.importorskip("kvtool.kernels.packed_attention.triton")
packing = pytest.importorskip("kvtool.kernels.packed_attention.pack_triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(4, 4), (2, 2), (3, 3), (8, 8), (4, 2), (2, 8)])
def test_attention_is_that_over_what_was_stored(bits, dtype):
    ring, blocks, lengths = packed_memory(*bits, dtype=dtype)
    q = torch.randn(len(lengths), 6, 64).to(DEVICE, dtype)
    expected = paged.packed_attention(q, ring, blocks, lengths, 0.125)
    found = kernel.packed_attention(q, ring, blocks, lengths, 0.125)
    assert found.dtype == dtype
    # Queries are rounded once more than in other kernels, with their scales.
    assert rms_ratio(found, expected) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("width", "size", "bits"),
    [(128, 64, (4, 2)), (128, 64, (8, 8)), (32, 32, (4, 4)), (256, 64, (4, 4)), (64, 16, (8, 8)),
     (48, 64, (2, 3)), (24, 64, (4, 2)), (80, 64, (8, 4)), (80, 64, (2, 8)), (96, 64, (4, 4)),
     (96, 32, (4, 8)), (96, 64, (3, 2)), (112, 64, (4, 3)), (192, 64, (4, 2)), (512, 64, (4, 4))],
)  # fmt: skip
def test_head_and_block_sizes(width, size, bits):
    assert fits(width, *bits, size)
    ring, blocks, lengths = packed_memory(*bits, width=width, size=size, lengths=(90, 200))
    q = torch.randn(2, 2, width, device=DEVICE)
    expected = paged.packed_attention(q, ring, blocks, lengths, 0.1)
    assert rms_ratio(kernel.packed_attention(q, ring, blocks, lengths, 0.1), expected) < 1e-5


def test_sizes_without_a_kernel():
    assert not fits(64, 2, 4, 32)  # too few tokens in a field
    assert not fits(20, 4, 4, 64)  # a byte would have numbers of two fields
    assert not fits(520, 4, 4, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 128, 192])
@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (3, 2), (8, 8)])
def test_blocks_are_packed_as_by_plain_torch(bits, width, dtype):
    clips = (0.85, 0.7) if bits[0] == 3 else (1.0, 1.0)
    due = (88, 20 + 4 + 3 * 64, 87, 5)  # the first two rows have just made one complete
    ring, blocks, lengths = packed_memory(
        *bits, width=width, lengths=due, clips=clips, dtype=dtype, heads=1
    )
    planes = ("keys", "key_scales", "values", "value_scales")
    copies = {name: getattr(blocks, name).clone() for name in planes}
    for name in planes:
        plane = getattr(blocks, name)
        for b, block in ((0, 0), (1, 2)):
            page, within = blocks.at(b, block)
            plane[page, :, within] = 0 if plane.dtype == torch.uint8 else torch.nan
    packing.pack_blocks(ring, blocks, lengths)
    for name in planes:
        assert torch.equal(getattr(blocks, name).view(torch.uint8), copies[name].view(torch.uint8))


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_not_a_number_reaches_the_reader():
    ring, blocks, lengths = packed_memory(4, 4, lengths=(88,), heads=1)
    ring.values[ring.rows[0], 0, 10, 5] = torch.nan
    ring.keys[ring.rows[0], 0, 12, 7] = torch.nan
    packing.pack_blocks(ring, blocks, lengths)
    page, within = blocks.at(0, 0)
    assert blocks.value_scales[page, 0, within, 6].isnan().all()
    broken = blocks.key_scales[page, 0, within].isnan().any(dim=-1)  # [D, 1]
    assert broken[:, 0].nonzero().tolist() == [[7]]
    q = torch.ones(1, 2, 64, device=DEVICE)
    assert kernel.packed_attention(q, ring, blocks, lengths, 0.125).isnan().any()


@pytest.mark.parametrize("items", [1, 3, 50])
def test_how_work_is_cut_does_not_matter(monkeypatch, items):
    ring, blocks, lengths = packed_memory(4, 4)
    q = torch.randn(len(lengths), 4, 64, device=DEVICE)
    expected = paged.packed_attention(q, ring, blocks, lengths, 0.125)
    monkeypatch.setattr(
        kernel, "Config", lambda **given: type(CONFIG)(**{**given, "items": items, "least": 1})
    )
    assert rms_ratio(kernel.packed_attention(q, ring, blocks, lengths, 0.125), expected) < 1e-5


CONFIG = kernel.Config(64, 2, 4, 4, 3)
