"""Compiles every Triton kernel for a Hopper GPU, on any machine; prints what each one needs.

The functions that launch them are called as always, with tensors on the CPU and the sizes of real
models; launching is replaced by compiling for the types, alignments and constants of the call.
"""

import json
import os
import re
from collections import Counter
from itertools import chain

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvtool.kernels.append import Encoder
from kvtool.kernels.append.triton import append
from kvtool.kernels.decode_attention.merge_triton import merge
from kvtool.kernels.decode_attention.triton import paged_decode_attention
from kvtool.kernels.gated_delta.triton import gated_delta_step
from kvtool.kernels.grouped_linear.triton import grouped_linear
from kvtool.kernels.hadamard.triton import hadamard
from kvtool.kernels.packed_attention import Blocks, Ring
from kvtool.kernels.packed_attention.pack_triton import pack_blocks
from kvtool.kernels.packed_attention.triton import packed_attention
from kvtool.kernels.packed_latents import Blocks as LatentBlocks
from kvtool.kernels.packed_latents.triton import pack_latents, packed_latent_attention
from kvtool.kernels.quantise import packed_bytes
from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention
from kvtool.kernels.rms_norm.triton import add_rms_norm, rms_norm
from kvtool.kernels.ssd.triton import causal_conv, ssd_chunked, ssd_step
from kvtool.kernels.streaming_attention.triton import streaming_attention
from kvtool.kernels.swiglu.triton import swiglu

Q, H, D, PAGE = 32, 8, 128, 64  # Llama-3-8B


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(function, grid):
    def launch(*args, **options):
        kernel = function.run(*args, grid=grid, warmup=True, **options)
        made = {"kernel": function.fn.__name__, "shared": kernel.metadata.shared}
        made |= {"cubin": len(kernel.asm["cubin"]), "sums": sums_of_a_pair(kernel.asm["ptx"])}
        print(json.dumps(made), flush=True)

    return launch


def sums_of_a_pair(ptx: str) -> int:
    """In how many sums one and the same pair of 16-bit integers is, at most."""
    sums = re.findall(r"add\.[su]16x2\s+%r\d+, (%r\d+), (%r\d+);", ptx)
    return max(Counter(chain(*sums)).values(), default=0)


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def pages(width: int, heads: int = H) -> Tensor:
    return half(4, heads, PAGE, width)


def packed_step(width: int, keys: int, values: int, dtype: torch.dtype = torch.bfloat16) -> None:
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    exact = torch.empty(3, H, 132, width, dtype=dtype)
    ring = Ring(exact, exact, lengths.long(), 4, 64)
    lines = {"keys": (width, packed_bytes(64, keys)), "values": (64, packed_bytes(width, values))}
    codes = {n: torch.empty(4, H, 1, *x, dtype=torch.uint8) for n, x in lines.items()}
    scales = [torch.empty(4, H, 1, n, g, 2).half() for n, g in ((width, 1), (64, width // 64))]
    blocks = Blocks(
        codes["keys"], scales[0], codes["values"], scales[1], table, keys, values
    )  # fmt: skip
    pack_blocks(ring, blocks, lengths)
    packed_attention(half(2, Q, width).to(dtype), ring, blocks, lengths, 0.1)


def packed_latent_step(heads: int, rank: int, rope: int, bits: dict[int, tuple[int, int]]) -> None:
    """Args: bits: By width, how many numbers of a latent have it, and of a shared key."""
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    latents = half(3, 1, 132, rank + rope)
    planes = [((4, 1, 1, sum(n)), packed_bytes(64, width)) for width, n in bits.items()]
    blocks = LatentBlocks(
        tuple(torch.empty(*shape, line, dtype=torch.uint8) for shape, line in planes),
        tuple(torch.empty(*shape, 1, 2).half() for shape, _ in planes),
        tuple(bits), tuple(n for n, _ in bits.values()), table,
    )  # fmt: skip
    ring = Ring(latents, latents[..., :rank], lengths.long(), 4, 64)
    pack_latents(ring, blocks, lengths)
    packed_latent_attention(half(2, heads, rank + rope), ring, blocks, lengths, 0.1)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_only
    lengths, slots = torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    table = torch.zeros(2, 2, dtype=torch.int32)
    q, k, cos = half(2, Q, D), half(2, H, D), half(2, D)

    hadamard(half(3, D))
    for width in (D, 576, 4096, 16384):
        rms_norm(half(2, width), half(width), 1e-5)
        add_rms_norm(half(2, width), half(2, width), half(width), 1e-5)
    swiglu(half(2, 2 * 14336))
    grouped_linear(half(2, Q, D), half(H, D, 512))
    grouped_linear(half(40, Q, 512), half(H, 512, D), half(H, D))
    merge((half(2, Q, D), half(Q, 2, D).transpose(0, 1)), (torch.empty(2, Q), torch.empty(2, Q)))
    append(k, k, cos, cos, pages(D), pages(D), slots, q)
    codes = [Encoder(half(H * D, 512), half(512), pages(512, 1)) for _ in range(2)]
    append(k, k, cos, cos, pages(D), pages(D), slots, q, key_code=codes[0], value_code=codes[1])
    latents, rope = pages(576, 1), half(2, 64)
    contents, shared = latents[..., :512], latents[..., 512:]
    asked = half(2, 128, 576)[..., 512:]
    new = half(2, 1, 64), half(2, 1, 512)
    append(*new, rope, rope, shared, contents, slots, asked, out=asked)
    paged_decode_attention(q, pages(D), pages(D), lengths, 0.1, table)
    paged_decode_attention(q, pages(D), pages(D), lengths, 0.1, table, sink_logits=half(Q))
    for width in (64, D, 256):
        floats, scales = pages(width).to(torch.float8_e4m3fn), (torch.ones(H), torch.ones(H))
        asked = half(2, Q, width)
        paged_decode_attention(asked, floats, floats, lengths, 0.1, table, scales=scales)
        new, turn = half(2, H, width), half(2, width)
        append(new, new, turn, turn, floats, floats.clone(), slots, asked, scales=scales)
    paged_decode_attention(half(2, 128, 576), pages(576, 1), 512, lengths, 0.1, table)
    paged_decode_attention(half(2, 64, 1088), pages(1088, 1), 1024, lengths, 0.1, table)
    for width in (512, 1024):  # codes; of fp32, what takes most shared memory
        paged_decode_attention(half(2, 64, width), *[pages(width, 1)] * 2, lengths, 0.1, table)
    wide = [x.float() for x in (half(2, 64, 640), pages(640, 1))]
    paged_decode_attention(wide[0], wide[1], wide[1], lengths, 0.1, table)
    for width, keys, values in ((D, 4, 4), (D, 3, 2), (64, 4, 2), (64, 8, 3)):
        packed_step(width, keys, values)
    packed_step(256, 4, 4, torch.float32)  # what takes most shared memory
    packed_latent_step(32, 448, 64, {4: (448, 64)})
    packed_latent_step(9, 144, 32, {2: (40, 2), 3: (20, 0), 4: (60, 20), 8: (24, 10)})
    for rank, heads in ((64, H), (512, 1)):
        coded = pages(rank, heads)
        rebuild_decode_attention(
            q, coded, half(H, rank, D), coded, cos, cos, lengths, 0.1, table, 0, half(H, D)
        )
    for width in (D, 256):
        q, k = half(2, Q, 100, width), half(2, H, 100, width)
        streaming_attention(q, k, k, 4, 256, 0.1)
        streaming_attention(q, k, k, 0, 100, 0.1, sink_logits=half(Q))
    x, dt, A = half(2, 600, Q, D), torch.empty(2, 600, Q), torch.empty(Q)
    state = torch.empty(2, Q, D, D)
    for segments in (1, 2):
        ssd_chunked(x, dt, A, x, x, state if segments == 1 else None, segments)
    ssd_step(x[:, 0], dt[:, 0], A, x[:, 0], x[:, 0], state)
    gated_delta_step(x[:, 0], x[:, 0], x[:, 0], dt[:, 0], dt[:, 0], state)
    causal_conv(half(2, 100, 3 * D), half(3 * D, 4), half(3 * D), half(2, 3 * D, 3))


if __name__ == "__main__":
    main()
