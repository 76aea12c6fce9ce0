"""The Triton kernel of decode attention does what its contract in plain torch does."""

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, Pages, random, rms_ratio

from kvtool.kernels.decode_attention import decode_attention, reference
from kvtool.kernels.dispatch import VARIABLE, use_triton
from kvtool.kernels.latent_attention import latent_decode_attention, paged_latent_attention

kernel = pytest.importorskip("kvtool.kernels.decode_attention.triton")
paged = kernel.paged_decode_attention
contract = reference.paged_decode_attention


@pytest.fixture(autouse=True)
def _fresh_numbers(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(torch.seed())
    print("seed", torch.initial_seed())


def assert_same(found, expected, dtype):
    (out, lse), (wanted, wanted_lse) = found, expected
    assert rms_ratio(out, wanted) <= TOLERANCE[dtype]
    empty = wanted_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    torch.testing.assert_close(lse[~empty], wanted_lse[~empty], rtol=1e-5, atol=1e-4)
    assert not out[empty].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "page"),
    [([70, 1, 0], 64), ([64, 128, 65], 64), ([35, 33], 16), ([68, 12], 68), ([131, 7], None)],
    ids=str,
)
@pytest.mark.parametrize(("heads", "group"), [(2, 3), (1, 20)])
def test_rows_of_any_length_on_any_pages(lengths, page, heads, group, dtype):
    pages = Pages.of(lengths, page)
    keys, values = (pages.plane(heads, 64, dtype) for _ in range(2))
    q = random(len(lengths), heads * group, 64, dtype=dtype)
    args = (q, keys, values, pages.lengths, 0.125, pages.table)
    assert_same(paged(*args), contract(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("key_width", "value_width"),
    [(80, 80), (96, 40), (128, 128), (256, 256), (16, 24), (72, 576), (1024, 1024)],
)
def test_keys_and_values_of_any_width(key_width, value_width, dtype):
    pages = Pages.of([33, 90], 64)
    keys, values = pages.plane(2, key_width, dtype), pages.plane(2, value_width, dtype)
    q = random(2, 4, key_width, dtype=dtype)
    args = (q, keys, values, pages.lengths, key_width**-0.5, pages.table)
    assert_same(paged(*args), contract(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "rope"), [(192, 32), (512, 64), (960, 64), (96, 0), (64, 64), (40, 16)]
)
def test_latents_are_keys_and_values(rank, rope, dtype):
    pages = Pages.of([70, 5], 64)
    latents = pages.plane(1, rank + rope, dtype)
    q = random(2, 9, rank + rope, dtype=dtype)
    args = (q, latents, rank, pages.lengths, 0.1, pages.table)
    assert_same(paged(*args), contract(*args), dtype)


@pytest.mark.parametrize("items", [1, 2, 5, 40])
def test_the_number_of_splits_does_not_matter(items):
    pages = Pages.of([300, 10, 129], 64)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    q = random(3, 6, 64)
    args = (q, keys, values, pages.lengths, 0.125, pages.table)
    config = kernel.Config(block_n=32, least=1, items=items, warps=4, stages=2)
    assert_same(paged(*args, config=config), contract(*args), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_one_row_may_have_lengths_of_their_own(dtype):
    pages = Pages.of([100, 80], None)
    lengths = torch.tensor([[100, 0, 65], [1, 80, 64]], dtype=torch.int32, device=DEVICE)
    keys, values = (pages.plane(3, 64, dtype) for _ in range(2))
    q = random(2, 6, 64, dtype=dtype)
    args = (q, keys, values, lengths, 0.125)
    assert_same(paged(*args), contract(*args), dtype)


@pytest.mark.parametrize("first", [1, 4, 63, 64, 70, 100])
def test_the_first_tokens_can_be_left_out(first):
    pages = Pages.of([99, 65, 3], 64)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    q = random(3, 2, 64)
    args = (q, keys, values, pages.lengths, 0.125, pages.table, first)
    assert_same(paged(*args), contract(*args), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_counts_merged_tokens(dtype):
    """A token with bias log 2 weighs as much as the same token stored twice."""
    pages = Pages.of([70, 9], 64)
    keys, values = (pages.plane(2, 64, dtype) for _ in range(2))
    bias = pages.plane(2, None, torch.float32)
    q = random(2, 4, 64, dtype=dtype)
    args = (q, keys, values, pages.lengths, 0.125, pages.table, 0, bias)
    assert_same(paged(*args), contract(*args), dtype)

    key, value = random(1, 2, 1, 64, dtype=dtype), random(1, 2, 1, 64, dtype=dtype)
    one, two = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (1, 2))
    doubled = torch.full((1, 2, 1), 2.0, device=DEVICE).log()
    _, merged = paged(q[:1], key, value, one, 0.125, bias=doubled)
    _, stored = paged(q[:1], *(x.repeat(1, 1, 2, 1) for x in (key, value)), two, 0.125)
    torch.testing.assert_close(merged, stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [3, 9])
@pytest.mark.parametrize(("key_width", "value_width"), [(64, 64), (80, 96), (128, 128), (256, 256)])
def test_numbers_in_e4m3_are_read_by_the_scales_of_their_heads(
    key_width, value_width, group, dtype
):
    """As the same numbers in float32, multiplied before: scales of 1e-3 to 10 do no harm."""
    pages, scales = Pages.of([70, 0, 131], 64), torch.tensor([[1e-3, 10.0], [3.0, 2e-3]])
    planes = [
        (30 * pages.plane(2, width, torch.float32)).to(torch.float8_e4m3fn)
        for width in (key_width, value_width)
    ]
    q = random(3, 2 * group, key_width, dtype=dtype)
    read = [x.float() * s[:, None, None] for x, s in zip(planes, scales.to(DEVICE), strict=True)]
    expected = contract(q.float(), *read, pages.lengths, 0.05, pages.table)
    args = (q, *planes, pages.lengths, 0.05, pages.table)
    own = tuple(scales.to(DEVICE))
    for run in (paged, contract):
        assert_same(run(*args, scales=own), expected, dtype)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "page"), [(64, 64), (80, 16), (128, 64)])
def test_further_heads_lie_in_rings(width, page, dtype, sinks):
    """In places of any order, some with a single token; a table may end before a ring does."""
    pages = Pages.of([20, 0, 131, 60], page)
    keys, values = (pages.plane(2, width, dtype) for _ in range(2))
    rings = [random(9, 3, 150, width, dtype=dtype) for _ in range(2)]
    filled, places = torch.tensor([150, 1, 67, 0]), torch.tensor([7, 0, 3, 8])
    for plane in rings:
        for place, n in zip(places, filled, strict=True):
            plane[place, :, n:] = torch.nan
        plane[[1, 2, 4, 5, 6]] = torch.nan
    lengths = torch.cat((pages.lengths[:, None].expand(4, 2), filled.to(pages.lengths)[:, None]
                         .expand(4, 3)), dim=1)  # fmt: skip
    q, out = random(4, 10, width, dtype=dtype), random(4, 12, width, dtype=dtype)
    more = {
        "rings": (*rings, places.int().to(DEVICE)),
        "sink_logits": random(10) if sinks else None,
    }
    args = (q, keys, values, lengths, 0.1, pages.table)
    expected = contract(*args, **more)
    apart = [
        contract(q[:, :4], keys, values, pages.lengths, 0.1, pages.table),
        contract(q[:, 4:], *rings, filled.int().to(DEVICE), 0.1, places[:, None].to(DEVICE)),
    ]
    if not sinks:
        assert torch.equal(expected[0], torch.cat([found for found, _ in apart], dim=1))
    assert_same(paged(*args, out=out[:, 1:11], **more), expected, dtype)
    assert torch.equal(out[:, 1:11], paged(*args, **more)[0])
    split = kernel.Config(block_n=16, least=1, items=7, warps=4, stages=2)
    assert_same(paged(*args, config=split, **more), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 8, 11])
@pytest.mark.parametrize("widths", [(64, 64), (80, 96), (128, 128)], ids=str)
def test_heads_may_be_the_columns_of_products(widths, group, dtype):
    """As they are for e4m3, by one warp; here with a bias and ends of rows, too."""
    pages = Pages.of([70, 0, 131], 64)
    keys, values = (pages.plane(2, width, dtype) for width in widths)
    bias = pages.plane(2, None, torch.float32)
    q = random(3, 2 * group, widths[0], dtype=dtype)
    config = kernel.Config(32, 1, items=5, warps=1, stages=3, heads=8, tokens_first=True)
    args = (q, keys, values, pages.lengths, 0.1, pages.table, 3, bias)
    assert_same(paged(*args, config=config), contract(*args), dtype)
    if widths[0] > 64:
        latents = (q, keys, 72, pages.lengths, 0.1, pages.table)
        assert_same(paged(*latents, config=config), contract(*latents), dtype)


@pytest.mark.parametrize("heads", [slice(0, 4), slice(4, 10)], ids=str)
def test_the_result_goes_to_some_heads_of_a_larger_one(heads):
    pages = Pages.of([70, 0, 131], 64)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    whole = torch.full((3, 10, 64), 7.0, device=DEVICE)
    args = (random(3, heads.stop - heads.start, 64), keys, values, pages.lengths, 0.1, pages.table)
    expected, found = contract(*args), paged(*args, out=whole[:, heads])
    assert found[0].data_ptr() == whole[:, heads].data_ptr()
    assert_same(found, expected, torch.float32)
    others = torch.ones(10, dtype=torch.bool)
    others[heads] = False
    assert (whole[:, others] == 7).all()


def test_no_row_has_anything_to_read():
    pages = Pages.of([0, 0], 64)
    keys = pages.plane(1, 64, torch.float32)
    out, lse = paged(random(2, 4, 64), keys, keys, pages.lengths, 0.125, pages.table)
    assert not out.any()
    assert bool(lse.isneginf().all())


def test_the_contract_is_what_the_cpu_path_computes():
    pages = Pages.of([50, 31], None)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    q = random(2, 6, 64)
    out, _ = contract(q, keys, values, pages.lengths, 0.125)
    torch.testing.assert_close(decode_attention(q, keys, values, [50, 31], 0.125), out)
    latents, rank = keys[:, 0], 48
    out, _ = contract(q, keys[:, :1], rank, pages.lengths, 0.125)
    torch.testing.assert_close(latent_decode_attention(q, latents, rank, [50, 31], 0.125), out)


def test_the_kernel_can_be_forced_and_refused(monkeypatch):
    pages = Pages.of([70, 3], 64)
    latents = pages.plane(1, 80, torch.float32)[:, 0]
    q = random(2, 3, 80)
    args = (q, latents, 64, pages.lengths, 0.125, pages.table)
    calls = []
    monkeypatch.setattr(kernel, "paged_decode_attention", lambda *a: calls.append(1) or paged(*a))
    monkeypatch.setenv(VARIABLE, "reference")
    expected = paged_latent_attention(*args)
    assert not calls
    monkeypatch.setenv(VARIABLE, "triton")
    assert_same(paged_latent_attention(*args), expected, torch.float32)
    assert calls
    monkeypatch.delenv(VARIABLE)
    assert use_triton(q) == q.is_cuda
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="can be reference, native or triton"):
        use_triton(q)
