"""What is appended lies where it is due and nowhere else; Triton does what torch does."""

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.append import Encoder
from kvtool.kernels.append.reference import append as reference
from kvtool.rope import Rope, rotate

PAGE = 5

pytestmark = pytest.mark.usefixtures("fresh_numbers")


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from kvtool.kernels.append.triton import append

    return append


def tables(batch, width, dtype):
    inv_freq = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float32) * 2 / width)
    positions = torch.randint(0, 5000, (batch,))
    return (table.to(DEVICE, dtype) for table in Rope(inv_freq).tables(positions))


def scattered(batch, pages, padding=()):
    """A slot of its own for every row, none for those of the padding."""
    slots = torch.randperm(pages * PAGE)[:batch]
    slots[list(padding)] = -1
    return slots.to(DEVICE)


def heads_of_one_matrix(batch, dtype, *counts):
    """Queries, keys and values as a projection leaves them: next to each other in a row."""
    sizes = [count * width for count, width in counts]
    parts = random(batch, sum(sizes), dtype=dtype).split(sizes, dim=-1)
    return [x.unflatten(-1, shape) for x, shape in zip(parts, counts, strict=True)]


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def written(planes):
    """Planes with what is not written for zero, and where that is."""
    return [plane.nan_to_num(0.0) for plane in planes], [plane.isnan() for plane in planes]


def assert_same_planes(got, expected, dtype):
    """A code is rounded twice, with its key and by itself; the interpreter cuts off instead."""
    got, expected = written(got), written(expected)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert rms_ratio(mine, theirs) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.usefixtures("poison")
def test_keys_are_rotated_and_all_is_written(kernel, batch, width, dtype):
    values = width + 8
    q, k, v = heads_of_one_matrix(batch, dtype, (6, width), (3, width), (3, values))
    cos, sin = tables(batch, width, dtype)
    slots = scattered(batch, 4, padding=(1,) if batch > 1 else ())
    planes = [[poisoned(4, 3, PAGE, n, dtype=dtype) for n in (width, values)] for _ in range(2)]
    got = kernel(k, v, cos, sin, *planes[0], slots, q)
    expected = reference(k, v, cos, sin, *planes[1], slots, q)
    turned = rotate(q.double(), cos[:, None].double(), sin[:, None].double())
    for wanted in (expected, turned):
        assert rms_ratio(got, wanted) <= TOLERANCE[dtype]
    assert_same_planes(*planes, dtype)
    assert int((~planes[0][0].isnan()).sum()) == 3 * width * int((slots >= 0).sum())


@pytest.mark.parametrize("append", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_further_heads_go_into_rings(append, dtype, request):
    """As by two calls; rows that are padding in one memory may not be so in the other."""
    append = reference if append == "reference" else request.getfixturevalue("kernel")
    q, k, v = heads_of_one_matrix(3, dtype, (10, 48), (5, 48), (5, 40))
    cos, sin = tables(3, 48, dtype)
    slots = scattered(3, 4, padding=(1,))
    places = torch.tensor([6 * 11 + 10, 2 * 11, -1], device=DEVICE)
    both = [
        ([poisoned(4, 2, PAGE, n, dtype=dtype) for n in (48, 40)],
         [poisoned(7, 3, 11, n, dtype=dtype) for n in (48, 40)])
        for _ in range(2)
    ]  # fmt: skip
    (pages, rings), (own_pages, own_rings) = both
    got = append(k, v, cos, sin, *pages, slots, q, rings=(*rings, places))
    expected = reference(k[:, :2], v[:, :2], cos, sin, *own_pages, slots, q)
    assert reference(k[:, 2:], v[:, 2:], cos, sin, *own_rings, places) is None
    assert rms_ratio(got, expected) <= TOLERANCE[dtype]
    assert_same_planes(pages, own_pages, dtype)
    assert_same_planes(rings, own_rings, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_pages_of_e4m3_get_the_nearest_number_and_no_larger_one(kernel, dtype):
    """Of what is divided by the scale of its head; RoPE is rounded to the dtype before."""
    q, k, v = heads_of_one_matrix(3, dtype, (6, 64), (2, 64), (2, 80))
    cos, sin = tables(3, 64, dtype)
    slots = scattered(3, 4, padding=(1,))
    scales = tuple(torch.tensor([[0.001, 1.0], [0.002, 0.3]], device=DEVICE))
    for append in (kernel, reference):
        planes = [poisoned(4, 2, PAGE, n).to(torch.float8_e4m3fn) for n in (64, 80)]
        append(k, v, cos, sin, *planes, slots, q, scales=scales)
        turned = rotate(k.double(), cos[:, None].double(), sin[:, None].double()).to(dtype)
        for plane, x, scale in zip(planes, (turned, v), scales, strict=True):
            there = torch.zeros(plane.shape, dtype=torch.bool, device=DEVICE)
            for row in (0, 2):
                page, place = divmod(int(slots[row]), PAGE)
                there[page, :, place] = True
                exact = (x[row].float() / scale[:, None]).clamp(-448, 448)
                found = plane[page, :, place].float()
                assert float(found.abs().max()) == 448  # the small scale is too small for some
                if x is v:
                    assert torch.equal(found, exact.to(torch.float8_e4m3fn).float())
                assert bool(((found - exact).abs() <= exact.abs() / 14 + 2**-9).all())
            assert bool(plane.float().isnan()[~there].all())


@pytest.mark.parametrize("append", ["kernel", "reference"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_rotated_where_they_are_due(append, own, dtype, request):
    """In place, or into a part of something else; what lies beside them is left alone."""
    append = reference if append == "reference" else request.getfixturevalue("kernel")
    k, v, q = random(3, 1, 48, dtype=dtype), random(3, 1, 20, dtype=dtype), random(3, 5, 60, 2)
    asked = q.to(dtype)[..., 0]  # channels do not lie together
    if own:
        asked = asked.contiguous()
    cos, sin = tables(3, 48, dtype)
    planes = [poisoned(4, 1, PAGE, n, dtype=dtype) for n in (48, 20)]
    slots, before = scattered(3, 4), asked.clone()
    whole = asked if own else poisoned(3, 5, 60, dtype=dtype)
    out = whole[..., 12:]
    got = append(k, v, cos, sin, *planes, slots, asked[..., 12:], out=out)
    assert got is out
    turned = rotate(before[..., 12:].double(), cos[:, None].double(), sin[:, None].double())
    assert rms_ratio(out, turned) <= TOLERANCE[dtype]
    beside = whole[..., :12]
    assert torch.equal(beside, before[..., :12]) if own else beside.isnan().all()


@pytest.mark.parametrize("append", ["kernel", "reference"])
def test_a_token_lies_in_its_page(append, request):
    append = reference if append == "reference" else request.getfixturevalue("kernel")
    k, v = random(2, 1, 16), random(2, 1, 16)
    cos, sin = torch.ones(2, 16, device=DEVICE), torch.zeros(2, 16, device=DEVICE)
    keys, values = poisoned(3, 1, PAGE, 16), poisoned(3, 1, PAGE, 16)
    slots = torch.tensor([2 * PAGE + 4, PAGE], device=DEVICE)
    assert append(k, v, cos, sin, keys, values, slots) is None
    assert torch.equal(keys[2, 0, 4], k[0, 0])
    assert torch.equal(values[1, 0, 0], v[1, 0])
    assert int((~keys.isnan()).sum()) == 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "width", "ranks"),
    [(1, 2, 64, (16, 24)), (3, 3, 80, (100, None)), (70, 1, 16, (8, 40)), (2, 2, 128, (None, 33))],
)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.usefixtures("poison")
def test_codes_are_written_in_the_same_call(kernel, batch, heads, width, ranks, rotated, dtype):
    k, v = heads_of_one_matrix(batch, dtype, (heads, width), (heads, width))
    cos, sin = tables(batch, width, dtype)
    padding = (1,) if batch > 1 else ()
    slots = scattered(batch, 20, padding)
    code_slots = scattered(batch, 30, padding)
    weights = [None if n is None else random(n, heads * width, dtype=dtype).T for n in ranks]
    bias = None if ranks[0] is None else random(ranks[0], dtype=dtype)

    def run(append):
        exact = [poisoned(20, heads, PAGE, width, dtype=dtype) for _ in range(2)]
        coded = [poisoned(30, 1, PAGE, n or 1, dtype=dtype) for n in ranks]
        codes = [
            None if weight is None else Encoder(weight, b, pages)
            for weight, b, pages in zip(weights, (bias, None), coded, strict=True)
        ]
        append(
            k, v, cos, sin, *exact, slots, key_code=codes[0], value_code=codes[1],
            code_slots=code_slots, code_rotated=rotated,
        )  # fmt: skip
        return [*exact, *coded]

    assert_same_planes(run(kernel), run(reference), dtype)
