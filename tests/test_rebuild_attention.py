"""Keys that are rebuilt and rotated in the kernel are those of the contract, and of the codes."""

import pytest
import torch
from _kernel_tools import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    Pages,
    needs_any_size,
    random,
    rms_ratio,
)

from kvtool.codes import Code, CodePlan, Positions, Projection
from kvtool.kernels.rebuild_attention import reference
from kvtool.rope import Rope

pytestmark = pytest.mark.usefixtures("fresh_numbers", "poison")
contract = reference.rebuild_decode_attention


@pytest.fixture
def rebuild():
    pytest.importorskip("triton")
    from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention

    return rebuild_decode_attention


def rope(width):
    return Rope(1000.0 ** -(torch.arange(width // 2) * 2 / width))


def inputs(pages, dtype, heads=2, group=3, width=64, ranks=(32, 48), shared=False, mean=True):
    rank = ranks[0]
    coded = 1 if shared else heads
    codes, values = (pages.plane(coded, n, dtype) for n in ranks)
    tables = rope(width).tables(torch.arange(int(pages.lengths.max()) + 1))
    return (
        random(len(pages.lengths), heads * group, width, dtype=dtype),
        codes,
        (random(heads, rank, width) / rank**0.5).to(dtype),
        values,
        *(table.to(DEVICE, dtype) for table in tables),
        pages.lengths,
        width**-0.5,
        pages.table,
        0,
        random(heads, width, dtype=dtype) if mean else None,
    )


def assert_same(found, expected, dtype):
    (out, lse), (wanted, wanted_lse) = found, expected
    assert rms_ratio(out, wanted) <= 2 * TOLERANCE[dtype]  # keys are rounded after they are rebuilt
    empty = wanted_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert not out[empty].any()
    if not bool(empty.all()):
        error = (lse - wanted_lse)[~empty].abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 0.05)


def test_the_contract_is_what_a_reader_of_codes_computes():
    heads, width, ranks, length = 2, 16, (20, 12), 40
    channels = heads * width
    plan = CodePlan("unrotated", 1, ranks)
    projections = {
        part: Projection(*(torch.randn(n) for n in ((r, channels), (channels, r), channels)))
        for part, r in zip(plan.parts, ranks, strict=True)
    }
    code = Code(plan, projections, heads, [Positions(rope(width), torch.zeros(1))])
    z, zv = torch.randn(1, length, ranks[0]), torch.randn(1, length, ranks[1])
    q = torch.randn(1, 6, 1, width)
    reader, first = code.reader(0), 3
    weights = (reader.scores(q, z[:, first:], first) * 0.2).softmax(-1)
    expected = weights @ zv[:, None, first:]
    keys = projections["keys"]
    out, _ = contract(
        q[:, :, 0], z[:, None], keys.decode.unflatten(0, (heads, -1)).mT, zv[:, None],
        *rope(width).tables(torch.arange(length)), torch.tensor([length], dtype=torch.int32), 0.2,
        None, first, keys.mean.view(heads, width),
    )  # fmt: skip
    torch.testing.assert_close(out, expected[:, :, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("lengths", "page"), [([70, 1, 0], 64), ([65, 33], 16), ([131, 7], None)], ids=str
)
def test_rows_of_any_length_on_any_pages(rebuild, lengths, page, shared, dtype):
    args = inputs(Pages.of(lengths, page), dtype, shared=shared)
    assert_same(rebuild(*args), contract(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "ranks"),
    [(64, (16, 16)), (80, (24, 40)), (96, (576, 96)), (128, (200, 512)), (256, (64, 64))],
)
def test_heads_and_codes_of_any_width(rebuild, width, ranks, dtype):
    if ranks[0] > 128 and ranks[0] % 64:
        needs_any_size()
    args = inputs(Pages.of([40, 67], 64), dtype, width=width, ranks=ranks, mean=False)
    assert_same(rebuild(*args), contract(*args), dtype)


@pytest.mark.parametrize("items", [1, 5, 40])
@pytest.mark.parametrize("first", [0, 4, 64])
def test_splits_and_tokens_left_out(rebuild, items, first):
    from kvtool.kernels.rebuild_attention.triton import config_for

    *args, _, mean = inputs(Pages.of([200, 10, 65], 64), torch.float32, group=1)
    config = config_for(64, 32, 48, 4)._replace(items=items)
    found = rebuild(*args, first, mean, config)
    assert_same(found, contract(*args, first, mean), torch.float32)


def test_heads_of_one_row_may_have_lengths_of_their_own(rebuild):
    args = list(inputs(Pages.of([100, 80], None), torch.float32))
    args[6] = torch.tensor([[100, 0], [1, 80]], dtype=torch.int32, device=DEVICE)
    assert_same(rebuild(*args), contract(*args), torch.float32)
