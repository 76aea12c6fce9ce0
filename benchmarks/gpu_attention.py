"""Cases of attention for `gpu.py` and `gpu_configs.py`: pages, latents, rings, codes, few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_bench import BFLOAT16, Case, copies, normal, rms_ratio
from kvtool.kernels.decode_attention import merge, paged_decode_attention
from kvtool.kernels.decode_attention import reference as decode_reference
from kvtool.kernels.grouped_linear import grouped_linear
from kvtool.kernels.latent_attention import paged_latent_attention
from kvtool.kernels.packed_attention import Blocks, Ring, pack_blocks, packed_attention
from kvtool.kernels.packed_attention import paged as paged_packed
from kvtool.kernels.packed_latents import Blocks as LatentBlocks
from kvtool.kernels.packed_latents import pack_latents, packed_latent_attention
from kvtool.kernels.packed_latents import reference as packed_latents_reference
from kvtool.kernels.quantise import quantise
from kvtool.kernels.rebuild_attention import rebuild_decode_attention
from kvtool.kernels.rebuild_attention import reference as rebuild_reference
from kvtool.kernels.streaming_attention import reference as streaming_reference
from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.rope import Rope
from kvtool.runtime.stores import PAGE
from kvtool.runtime.streams import at_once


def paged(device: torch.device, batch: int, tokens: int, heads: int, *widths: int) -> list[Tensor]:
    """Planes of as many widths, the table of their pages in random order, and the lengths."""
    pages = batch * -(-tokens // PAGE)
    table = torch.randperm(pages, device=device).view(batch, -1).int()
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    return [*(normal(device, pages, heads, PAGE, width) for width in widths), table, lengths]


def first_row(table: Tensor, lengths: Tensor, *planes: Tensor) -> list[Tensor]:
    """The first row alone, its pages side by side."""
    own = table[0].long()
    order = torch.arange(len(own), dtype=torch.int32, device=table.device)[None]
    return [*(plane[own] for plane in planes), order, lengths[:1]]


def decode_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Every token of every head, as without a plan; beside torch on contiguous rows."""
    for name, (queries, heads, width) in shapes.items():
        for batch, tokens in sizes:
            nbytes = batch * tokens * heads * width * 4
            if device.type == "cuda" and nbytes > 0.3 * torch.cuda.mem_get_info()[1]:
                continue
            inputs = []
            for _ in range(copies(nbytes)):
                keys, values, table, lengths = paged(device, batch, tokens, heads, width, width)
                q = normal(device, batch, queries, width)
                inputs.append((q, keys, values, lengths, width**-0.5, table))

            def error(inputs: list[Any] = inputs) -> float:
                q, keys, values, lengths, scaling, table = inputs[0]
                found, _ = paged_decode_attention(*inputs[0])
                keys, values, table, lengths = first_row(table, lengths, keys, values)
                exact, _ = decode_reference.paged_decode_attention(
                    q[:1].float(), keys, values, lengths, scaling, table
                )
                return rms_ratio(found[:1], exact)

            # Contiguous rows of the same bytes: pages are as good as any random numbers.
            def rows_of(plane: Tensor, batch: int = batch, tokens: int = tokens) -> Tensor:
                pages, heads, page, width = plane.shape
                return plane.view(batch, heads, pages // batch * page, width)[:, :, :tokens]

            sdpa = [
                lambda x=x: F.scaled_dot_product_attention(
                    x[0][:, :, None], rows_of(x[1]), rows_of(x[2]), enable_gqa=True
                )
                for x in inputs
            ]
            yield Case(
                "decode_attention", name, batch, tokens, nbytes,
                4 * batch * tokens * queries * width,
                [lambda x=x: paged_decode_attention(*x) for x in inputs],
                error, {"sdpa": sdpa},
            )  # fmt: skip


def float_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """The same in e4m3, and what stores a step's tokens there."""
    for name, (queries, heads, width) in shapes.items():
        for batch, tokens in sizes:
            nbytes = batch * tokens * heads * width * 2
            scales = tuple(torch.rand(2, heads, device=device) / 100 + 0.005)
            inputs = []
            for _ in range(copies(nbytes)):
                planes = paged(device, batch, tokens, heads, width, width)
                keys, values = (
                    (x * 100).clamp(-448, 448).to(torch.float8_e4m3fn) for x in planes[:2]
                )
                q = normal(device, batch, queries, width)
                inputs.append((q, keys, values, planes[3], width**-0.5, planes[2]))

            def error(inputs: list[Any] = inputs, scales: tuple[Tensor, ...] = scales) -> float:
                q, keys, values, lengths, scaling, table = inputs[0]
                found, _ = paged_decode_attention(*inputs[0], scales=scales)
                keys, values, table, lengths = first_row(table, lengths, keys, values)
                exact, _ = decode_reference.paged_decode_attention(
                    q[:1].float(), keys, values, lengths, scaling, table, scales=scales
                )
                return rms_ratio(found[:1], exact)

            yield Case(
                "decode_attention", f"{name}, fp8", batch, tokens, nbytes,
                4 * batch * tokens * queries * width,
                [lambda x=x, s=scales: paged_decode_attention(*x, scales=s) for x in inputs],
                error,
            )  # fmt: skip


def flex_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """FlexAttention decoding, on as many rows as decode_attention reads above.

    Also with a mask of blocks in which every token is seen: what it is given decides how it splits.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    queries, heads, width = 32, 8, 128
    nbytes = batch * tokens * heads * width * 4
    runs = []
    for _ in range(copies(nbytes)):
        keys, values = (normal(device, batch, heads, tokens, width) for _ in range(2))
        q = normal(device, batch, queries, 1, width)
        runs.append(partial(flex, q, keys, values, enable_gqa=True))
    mask = create_block_mask(
        lambda b, h, i, j: j < tokens, None, None, 1, tokens, device=str(device)
    )
    masked = [lambda run=run: run(block_mask=mask) for run in runs]
    others: dict[str, list[Callable[[], Any]]] = {"flex_masked": masked}
    yield Case("flex_attention", "Llama-3-8B", batch, tokens, nbytes, 0, runs, None, others)


def latent_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Absorbed MLA."""
    for name, (queries, rank, rope) in shapes.items():
        for batch, tokens in sizes:
            nbytes = batch * tokens * (rank + rope) * 2
            inputs = []
            for _ in range(copies(nbytes)):
                latents, table, lengths = paged(device, batch, tokens, 1, rank + rope)
                q = normal(device, batch, queries, rank + rope)
                scaling = (rank + rope) ** -0.5
                inputs.append((q, latents[:, 0], rank, lengths, scaling, table))

            def error(inputs: list[Any] = inputs) -> float:
                q, latents, rank, lengths, scaling, table = inputs[0]
                found, _ = paged_latent_attention(*inputs[0])
                own, table, lengths = first_row(table, lengths, latents[:, None])
                exact, _ = decode_reference.paged_decode_attention(
                    q[:1].float(), own, rank, lengths, scaling, table
                )
                return rms_ratio(found[:1], exact)

            yield Case(
                "latent_attention", name, batch, tokens, nbytes,
                2 * batch * tokens * queries * (2 * rank + rope),
                [lambda x=x: paged_latent_attention(*x) for x in inputs], error,
            )  # fmt: skip


def split_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """A layer of Llama-3-8B half of whose heads stream."""
    queries, heads, width, sink, window = 32, 8, 128, 4, 256
    scaling, half, ring = width**-0.5, heads // 2, sink + window
    own, inputs = torch.arange(batch, dtype=torch.int32, device=device), []
    for _ in range(3):  # where memory lies makes a difference of a tenth
        keys, values, table, lengths = paged(device, batch, tokens, half, width, width)
        near = [normal(device, batch, half, ring, width) for _ in range(2)]
        filled = lengths.clamp(max=ring)
        both = torch.stack((lengths, filled), dim=1).repeat_interleave(half, dim=1)
        q = normal(device, batch, queries, width)
        inputs.append((q, keys, values, both, table, (*near, own)))

    def split(
        q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, table: Tensor,
        rings: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        return paged_decode_attention(q, keys, values, lengths, scaling, table, rings=rings)[0]

    def split_error() -> float:
        q, keys, values, lengths, table, rings = inputs[0]
        planes = first_row(table, lengths[:, 0], keys, values)
        far, _ = decode_reference.paged_decode_attention(
            q[:1, : queries // 2].float(), *planes[:2], planes[3], scaling, planes[2]
        )
        close, _ = decode_reference.paged_decode_attention(
            q[:1, queries // 2 :].float(), *(x[:1] for x in rings[:2]), lengths[:1, -1], scaling
        )
        return rms_ratio(split(*inputs[0])[:1], torch.cat((far, close), dim=1))

    yield Case(
        "plan", "Llama-3-8B, half of the heads stream", batch, tokens,
        4 * batch * half * width * (tokens + ring), 2 * batch * tokens * queries * width,
        [partial(split, *x) for x in inputs], split_error,
    )  # fmt: skip


def code_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """The same with codes of half the width, read as they are and rebuilt."""
    queries, heads, width = 32, 8, 128
    scaling, rank = width**-0.5, heads * width // 2
    q = normal(device, batch, queries, width)
    own = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    key_codes, value_codes, table, lengths = paged(device, batch, tokens, 1, rank, rank)
    exact = [normal(device, batch, heads, 68, width) for _ in range(2)]
    code_q = normal(device, batch, queries, rank)
    decode = normal(device, heads, rank, width) * rank**-0.5

    near_lengths, far_lengths = lengths.clamp(max=68), lengths - 64

    def codes() -> Tensor:
        (close, close_mass), (far, far_mass) = at_once(
            device,
            lambda: paged_decode_attention(q, *exact, near_lengths, scaling, own),
            lambda: paged_decode_attention(
                code_q, key_codes, value_codes, far_lengths, scaling, table, 4
            ),
        )
        return merge((close, grouped_linear(far, decode)), (close_mass, far_mass))

    def codes_error() -> float:
        found, _ = paged_decode_attention(
            code_q, key_codes, value_codes, far_lengths, scaling, table, 4
        )
        planes = first_row(table, lengths, key_codes, value_codes)
        wanted, _ = decode_reference.paged_decode_attention(
            code_q[:1].float(), *planes[:2], planes[3] - 64, scaling, planes[2], 4
        )
        return rms_ratio(found[:1], wanted)

    yield Case(
        "plan", "Llama-3-8B, codes of half the width", batch, tokens, 4 * batch * tokens * rank,
        4 * batch * tokens * queries * rank, [codes], codes_error,
    )  # fmt: skip
    decoder = normal(device, heads, rank, width) * rank**-0.5
    rope = Rope(500000.0 ** -(torch.arange(0, width, 2, device=device) / width))
    cos, sin = (x.to(BFLOAT16) for x in rope.tables(torch.arange(tokens, device=device)))
    arguments = (q, key_codes, decoder, value_codes, cos, sin, lengths - 64, scaling, table, 4)

    def rebuilt_error() -> float:
        found, _ = rebuild_decode_attention(*arguments)
        planes = first_row(table, lengths, key_codes, value_codes)
        wanted, _ = rebuild_reference.rebuild_decode_attention(
            q[:1].float(), planes[0], decoder, planes[1], cos, sin, planes[3] - 64, scaling,
            planes[2], 4,
        )  # fmt: skip
        return rms_ratio(found[:1], wanted)

    yield Case(
        "plan", "Llama-3-8B, codes of half the width, keys rebuilt", batch, tokens,
        4 * batch * tokens * rank,
        2 * batch * tokens * (heads * rank * width + queries * (width + rank)),
        [lambda: rebuild_decode_attention(*arguments)], rebuilt_error,
    )  # fmt: skip


def streaming_cases(device: torch.device, tokens: int) -> Iterator[Case]:
    """Reading a prompt with the streaming heads of Llama-3-8B."""
    queries, heads, width, sink, window = 32, 8, 128, 64, 256
    q, k, v = (normal(device, 1, n, tokens, width) for n in (queries, heads, heads))

    def error() -> float:
        exact = streaming_reference.streaming_attention(
            *(x.float() for x in (q, k, v)), sink, window, width**-0.5
        )
        return rms_ratio(streaming_attention(q, k, v, sink, window, width**-0.5), exact)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    others: dict[str, list[Callable[[], Any]]] = {"sdpa_causal": [dense]}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ((j < sink) | (i - j < window))

        mask = create_block_mask(seen, None, None, tokens, tokens, device=device)
        flex = torch.compile(flex_attention, dynamic=False)
        others["flex"] = [lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)]
    yield Case(
        "streaming_attention", "Llama-3-8B prompt, sinks 64, window 256", 1, tokens,
        2 * tokens * width * (2 * queries + 2 * heads), 4 * tokens * queries * width * 320,
        [lambda: streaming_attention(q, k, v, sink, window, width**-0.5)], error, others,
    )  # fmt: skip


PACKED = {
    "Llama-3-8B": ((32, 8, 128), ((4, 4), (4, 2), (3, 3), (2, 2))),
    "32 heads of 96": ((32, 32, 96), ((4, 4),)),
    "16 on 8 heads of 256": ((16, 8, 256), ((4, 4),)),
    "32 on 4 heads of 512": ((32, 4, 512), ((4, 4),)),
}
"""Query heads, KV heads and their width; bits of keys and values."""


def packed_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """The same with keys and values of few bits; and packing a block of each row."""
    size, sink, window = PAGE, 4, 64
    pages = batch * -(-tokens // PAGE)
    table = torch.randperm(pages, device=device).view(batch, -1).int()
    # So that the newest token of every row makes a block complete.
    blocks_of_a_row = (tokens - sink - window) // size
    lengths = torch.full((batch,), sink + window + size * blocks_of_a_row, device=device).int()
    for name, ((queries, heads, width), several) in PACKED.items():
        scaling = width**-0.5
        q = normal(device, batch, queries, width)
        ring = Ring(
            *(normal(device, batch, heads, sink + window + size, width) for _ in range(2)),
            torch.arange(batch, device=device), sink, window,
        )  # fmt: skip
        for keys, values in several:
            planes = []
            for lines, numbers, bits in ((width, size, keys), (size, width, values)):
                x = normal(device, pages, heads, 1, lines, numbers)
                planes += quantise(x, bits, size)
            blocks = Blocks(*planes, table, keys, values)

            run = partial(packed_attention, q, ring, blocks, lengths, scaling)
            own = table[0].long()
            first = blocks._replace(
                **{name: getattr(blocks, name)[own] for name in Blocks._fields[:4]},
                table=torch.arange(len(own), device=device)[None],
            )
            exact = partial(
                paged_packed.packed_attention, q[:1].float(), ring, first, lengths[:1], scaling
            )

            def error(found: Callable[[], Tensor] = run, exact: Any = exact) -> float:
                return rms_ratio(found()[:1], exact())

            each = sum(plane[0].nbytes for plane in planes)
            nbytes = batch * blocks_of_a_row * each + 4 * batch * heads * (sink + window) * width
            yield Case(
                "packed_attention", f"{name}, K{keys}V{values}", batch, tokens, nbytes,
                4 * batch * tokens * queries * width,
                [run], error,
            )  # fmt: skip
        yield Case(
            "pack_blocks", f"{name}, K{keys}V{values}", batch, tokens,
            batch * (4 * heads * size * width + each), 0,
            [partial(pack_blocks, ring, blocks, lengths)], None,
        )  # fmt: skip


def packed_latent_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Absorbed MLA over latents of 4 bits; and packing a block of each row."""
    size, bits, sink, window = PAGE, 4, 4, 64
    for name, (queries, rank, rope) in shapes.items():
        for batch, tokens in sizes:
            width, pages = rank + rope, batch * -(-tokens // PAGE)
            # So that the newest token of every row makes a block complete.
            done = (tokens - sink - window) // size
            lengths = torch.full((batch,), sink + window + size * done, device=device).int()
            each = width * (size * bits // 8 + 4)
            nbytes = batch * (done * each + 2 * (sink + window) * width)
            inputs: list[Any] = []
            for _ in range(copies(nbytes)):
                codes, scales = quantise(normal(device, pages, 1, 1, width, size), bits, size)
                latents = normal(device, batch, 1, sink + window + size, width)
                rows = torch.arange(batch, device=device)
                ring = Ring(latents, latents[..., :rank], rows, sink, window)
                table = torch.randperm(pages, device=device).view(batch, -1).int()
                blocks = LatentBlocks((codes,), (scales,), (bits,), (rank,), table)
                q = normal(device, batch, queries, width)
                inputs.append((q, ring, blocks, lengths, width**-0.5))

            def error(inputs: list[Any] = inputs) -> float:
                q, ring, blocks, lengths, scaling = inputs[0]
                own = blocks.table[0].long()
                first = blocks._replace(
                    codes=(blocks.codes[0][own],), scales=(blocks.scales[0][own],),
                    table=torch.arange(len(own), device=device)[None],
                )  # fmt: skip
                exact = packed_latents_reference.packed_latent_attention(
                    q[:1].float(), ring, first, lengths[:1], scaling
                )
                return rms_ratio(packed_latent_attention(*inputs[0])[:1], exact)

            yield Case(
                "packed_latents", f"{name}, {bits} bits", batch, tokens, nbytes,
                2 * batch * tokens * queries * (2 * rank + rope),
                [lambda x=x: packed_latent_attention(*x) for x in inputs], error,
            )  # fmt: skip
            yield Case(
                "pack_latents", f"{name}, {bits} bits", batch, tokens,
                batch * (2 * size * width + each), 0,
                [lambda x=x: pack_latents(*x[1:4]) for x in inputs], None,
            )  # fmt: skip
