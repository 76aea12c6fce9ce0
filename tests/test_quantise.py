"""Integers of few bits: what is read is within half a scale of what was stored."""

import pytest
import torch
from _kernel_tools import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtool.kernels.quantise import (
    BITS,
    dequantise,
    fake_quantise,
    groups_of,
    packed_bytes,
    quantise,
    quantise_rows,
    unpack,
)

LARGEST = 65504.0
WIDTHS = (1, 2, 3, 5, 31, 32, 33, 64, 100)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(x: Tensor, bits: int, group: int = 32) -> Tensor:
    return dequantise(*quantise(x, bits, group), x.shape[-1], bits, group)


def per_channel(x: Tensor, width: int, group: int) -> Tensor:
    return x.float().repeat_interleave(group, dim=-1)[..., :width]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("group", [1, 5, 32])
def test_shapes_are_what_the_sizes_say(bits, width, group):
    packed, scales = quantise(random(2, 3, width), bits, group)
    assert (packed.dtype, scales.dtype) == (torch.uint8, torch.float16)
    assert packed.shape == (2, 3, packed_bytes(width, bits))
    assert scales.shape == (2, 3, groups_of(width, group), 2)
    planes = (2, 1) if bits == 3 else (bits,)
    assert packed_bytes(width, bits) == sum(-(-width * plane // 8) for plane in planes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_code_comes_back(bits, width):
    """Numbers on a grid that fp16 holds, both ends in the group, are stored exactly."""
    top, generator = 2**bits - 1, torch.Generator().manual_seed(0)
    codes = torch.randint(0, top + 1, (1000, width), generator=generator)
    codes[:, 0], codes[:, -1] = 0, top
    x = codes * 0.25 - 3
    group = max(5, width)
    torch.testing.assert_close(read(x, bits, group), x, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_range_of_whole_scales_has_that_scale_on_every_device(bits):
    """As ranges of bfloat16 numbers often are; the product with 1 / top can be an ulp above it."""
    top = 2**bits - 1
    scale = torch.arange(1, 2**15, dtype=torch.int16).view(torch.float16).float().to(DEVICE)
    scale = scale[scale * top <= LARGEST]
    codes, scales = quantise(torch.stack((torch.zeros_like(scale), scale * top), dim=-1), bits)
    assert torch.equal(scales[:, 0, 0].float(), scale)
    ends = torch.tensor([0, top], dtype=torch.uint8, device=DEVICE)
    assert torch.equal(unpack(codes, 2, bits), ends.expand(len(scale), 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_whole_scales_has_that_scale_on_every_device(bits):
    scale = torch.arange(2**7, 2**14, dtype=torch.int16).view(torch.bfloat16).float().to(DEVICE)
    _, scales = quantise_rows(scale[:, None] * (2 ** (bits - 1) - 1), bits)
    assert torch.equal(scales.float(), scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_planar_low_bits_first(bits):
    top, fields = 2**bits - 1, 8 // bits
    codes = torch.arange(8 * fields).remainder(top + 1)
    codes[0], codes[1] = 0, top
    packed, scales = quantise(codes.float(), bits, len(codes))
    assert scales.tolist() == [[1.0, 0.0]]
    expected = [sum(int(codes[c + 8 * f]) << (bits * f) for f in range(fields)) for c in range(8)]
    assert packed.tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_a_clipped_range_has_a_smaller_step_and_stores_its_ends(bits):
    x = random(50, 32)
    codes, scales = quantise(x, bits, 32, 0.5)
    read = dequantise(codes, scales, 32, bits, 32)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    cut = (high - low) / 4
    inside = x.clamp(low + cut, high - cut)
    step = scales[..., 0].float()
    torch.testing.assert_close(step, (high - low) / 2 / (2**bits - 1), rtol=0.01, atol=0)
    assert ((read - inside).abs() <= step * 0.51 + 2e-3).all()
    torch.testing.assert_close(fake_quantise(x, bits, 32, 0.5), read)


def test_three_bits_are_a_plane_of_two_and_one_of_the_third():
    codes = torch.tensor([7.0, 0, 1, 2, 3, 4, 5, 6])
    packed, _ = quantise(codes, 3, 8)
    low, third = codes.int() & 3, codes.int() >> 2
    two = [sum(int(low[c + 2 * f]) << (2 * f) for f in range(4)) for c in range(2)]
    assert packed.tolist() == [*two, sum(int(bit) << c for c, bit in enumerate(third))]


@pytest.mark.parametrize("bits", BITS)
@given(
    size=st.floats(1e-6, 1e4),
    offset=st.floats(-5e4, 5e4),
    width=st.sampled_from(WIDTHS),
    group=st.sampled_from([3, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_at_most_half_the_stored_scale(bits, size, offset, width, group, seed):
    x = (random(4, width, seed=seed) * size + offset).clamp(-LARGEST, LARGEST)
    _, scales = quantise(x, bits, group)
    scale = per_channel(scales[..., 0], width, group)
    error = (read(x, bits, group).double() - x).abs()
    assert (error <= scale / 2 + 4e-7 * x.abs().clamp(min=1e-30)).all()


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_no_larger_than_a_group_needs(bits):
    x = random(50, 64)
    _, scales = quantise(x, bits)
    groups = x.unflatten(-1, (-1, 32))
    spread = groups.amax(-1) - groups.amin(-1)
    assert (scales[..., 0] <= (spread / (2**bits - 1)) * 1.002 + 2e-3 / (2**bits - 1)).all()
    assert (scales[..., 1].float() <= groups.amin(-1)).all()
    assert (scales[..., 1].float() >= groups.amin(-1) - 4e-3).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1 / 3, -1000.1, 1e-9, LARGEST, -LARGEST])
def test_a_constant_group_comes_back(bits, value):
    x = torch.full((2, 40), value)
    found = read(x, bits)
    if float(torch.tensor(value).half()) == value:
        assert torch.equal(found, x)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=3e-8)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_numbers_saturate_and_leave_other_groups_alone(bits):
    x = random(3, 64)
    alone = read(x, bits)
    x[0, 5], x[1, 5], x[2, 5] = torch.inf, -torch.inf, 1e30
    x[1, 6] = 1e30
    found = read(x, bits)
    assert found.isfinite().all()
    assert torch.equal(found[:, 32:], alone[:, 32:])
    torch.testing.assert_close(
        found[:, 5], torch.tensor([LARGEST, -LARGEST, LARGEST]), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("bits", BITS)
def test_a_nan_makes_its_group_nan_and_no_other(bits):
    x = random(2, 64)
    alone = read(x, bits)
    x[0, 40] = torch.nan
    found = read(x, bits)
    assert found[0, 32:].isnan().all()
    assert torch.equal(found[0, :32], alone[0, :32])
    assert torch.equal(found[1], alone[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_and_layout_do_not_matter(bits, dtype):
    x = random(6, 4, 50).to(dtype)
    whole, scales = quantise(x, bits)
    turned = x.transpose(0, 1)  # not contiguous
    for b in range(4):
        packed, own = quantise(turned[b], bits)
        assert torch.equal(packed, whole[:, b])
        assert torch.equal(own, scales[:, b])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [33, 64])
def test_training_sees_what_is_stored(bits, width):
    x = random(10, width).requires_grad_()
    found = fake_quantise(x, bits)
    assert torch.equal(found, read(x.detach(), bits))
    weight = random(10, width, seed=1)
    (found * weight).sum().backward()
    # x̂ = x + s e, with the rounding errors e for fixed.
    again = x.detach().clone().requires_grad_()
    ends = (y.split(32, dim=-1) for y in (again, again.detach(), found.detach(), weight))
    loss = torch.tensor(0.0)
    for own, fixed, stored, w in zip(*ends, strict=True):
        steps = 2**bits - 1
        scale = (own.amax(-1, keepdim=True) - own.amin(-1, keepdim=True)) / steps
        errors = torch.where(scale == 0, 0.0, (stored - fixed) / scale).detach()
        loss = loss + ((own + scale * errors) * w).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
