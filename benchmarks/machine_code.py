"""What a Hopper GPU would run of every Triton kernel, compiled on any machine.

For each: registers of a thread, shared memory, bytes of registers that do not fit and go through
memory, and the instructions of a warp in the longest loop, of them matrix products.

    python -m benchmarks.machine_code [--json] [--few]

The functions that launch kernels are called as always, with tensors on the CPU and the sizes of
real models; launching is replaced by compiling for the types, alignments and constants of the call.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvtool.kernels.append import Encoder
from kvtool.kernels.append.triton import append
from kvtool.kernels.decode_attention import triton as decode
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
from kvtool.kernels.quantise import groups_of, packed_bytes
from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention
from kvtool.kernels.rms_norm.triton import add_rms_norm, rms_norm
from kvtool.kernels.ssd.triton import causal_conv, ssd_chunked, ssd_step
from kvtool.kernels.streaming_attention.triton import streaming_attention
from kvtool.kernels.swiglu.triton import swiglu
from kvtool.kernels.tiles import ptxas_version

Q, H, D, PAGE = 32, 8, 128, 64  # Llama-3-8B
TOOLS = Path(nvidia.__file__).parent / "bin"


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def facts_of(kernel: Any) -> dict[str, Any]:
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        needs = run("cuobjdump", "-res-usage", file.name)
        loop = longest_loop(run("nvdisasm", "-c", file.name))
    return {
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", needs)[1]),
        "shared": kernel.metadata.shared,
        "spilled": int(re.search(r"STACK:(\d+)", needs)[1]),
        "loop": len(loop),
        "products": sum("MMA" in line for line in loop),
        "cubin": len(kernel.asm["cubin"]),
        "sums": sums_of_a_pair(kernel.asm["ptx"]),
    }


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def longest_loop(machine_code: str) -> list[str]:
    """The instructions between a label and the farthest branch back to it."""
    found: list[str] = []
    labels: dict[str, int] = {}
    longest = range(0)
    for line in machine_code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            found.append(line)
            branch = re.search(r"BRA\b.*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, range(labels[branch[1]], len(found)), key=len)
    # Code ends with an instruction that branches to itself.
    return found[longest.start : longest.stop] if len(longest) > 1 else []


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
    groups = ((width, 1), (64, groups_of(width, 64)))
    scales = [torch.empty(4, H, 1, *shape, 2).half() for shape in groups]
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


def floats_step(width: int) -> None:
    floats, scales = pages(width).to(torch.float8_e4m3fn), (torch.ones(H), torch.ones(H))
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    new, turn, slots = half(2, H, width), half(2, width), torch.zeros(2, dtype=torch.int64)
    append(new, new, turn, turn, floats, floats.clone(), slots, half(2, Q, width), scales=scales)
    paged_decode_attention(half(2, Q, width), floats, floats, lengths, 0.1, table, scales=scales)


def cases(*, few: bool = False) -> Iterator[tuple[str, Callable[[], object]]]:
    """What kernels are compiled for, and a call that does.

    Args:
        few: Without what takes long and compiles if the others do.
    """
    lengths, slots = torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    table = torch.zeros(2, 2, dtype=torch.int32)
    q, k, cos = half(2, Q, D), half(2, H, D), half(2, D)

    yield "128", partial(hadamard, half(3, D))
    for width in (D, 576, 4096, 16384):
        yield f"{width}", partial(rms_norm, half(2, width), half(width), 1e-5)
        two = half(2, width), half(2, width)
        yield f"{width}, and a sum", partial(add_rms_norm, *two, half(width), 1e-5)
    yield "14336", partial(swiglu, half(2, 2 * 14336))
    yield "128 to 512, 2 rows", partial(grouped_linear, half(2, Q, D), half(H, D, 512))
    back = half(40, Q, 512), half(H, 512, D), half(H, D)
    yield "512 to 128, 40 rows", partial(grouped_linear, *back)
    parts = half(2, Q, D), half(Q, 2, D).transpose(0, 1)
    yield "two parts", partial(merge, parts, (torch.empty(2, Q), torch.empty(2, Q)))

    new = k, k, cos, cos, pages(D), pages(D), slots, q
    yield "8 heads of 128", partial(append, *new)
    codes = [Encoder(half(H * D, 512), half(512), pages(512, 1)) for _ in range(2)]
    encoded = partial(append, *new, key_code=codes[0], value_code=codes[1])
    yield "8 heads of 128, codes of 512", encoded
    latents, rope = pages(576, 1), half(2, 64)
    contents, shared = latents[..., :512], latents[..., 512:]
    asked = half(2, 128, 576)[..., 512:]
    new = half(2, 1, 64), half(2, 1, 512), rope, rope, shared, contents, slots, asked
    yield "latents of 512 + 64", partial(append, *new, out=asked)

    attend = partial(paged_decode_attention, lengths=lengths, scaling=0.1, table=table)
    yield "32 on 8 heads of 128", partial(attend, q, pages(D), pages(D))
    sinks = partial(attend, q, pages(D), pages(D), sink_logits=half(Q))
    yield "32 on 8 heads of 128, sink logits", sinks
    near, half_full = [half(3, 4, 132, D)] * 2, [pages(D, 4)] * 2
    both, places = torch.ones(2, 8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    split = partial(attend, q, *half_full, lengths=both, rings=(*near, places))
    yield "32 on 8 heads of 128, 4 in rings", split
    for width in (64, D, 256, 512):
        yield f"32 on 8 heads of {width}, fp8", partial(floats_step, width)
    for heads, rank, turned in ((16, 512, 64), (32, 448, 64), (128, 512, 64), (64, 1024, 64)):
        read = half(2, heads, rank + turned), pages(rank + turned, 1), rank
        yield f"{heads} heads on {rank} + {turned}", partial(attend, *read)
    for width in (512, 1024):  # codes; of fp32, what takes most shared memory
        coded = half(2, 64, width), *[pages(width, 1)] * 2
        yield f"64 heads on codes of {width}", partial(attend, *coded)
    wide = [x.float() for x in (half(2, 64, 640), pages(640, 1))]
    yield "64 heads on codes of 640, fp32", partial(attend, wide[0], wide[1], wide[1])

    several = (D, 4, 4), (D, 3, 2), (64, 4, 2), (64, 8, 3), (96, 4, 4), (256, 4, 4), (512, 4, 2)
    for width, keys, values in several:
        name = f"32 on 8 heads of {width}, {keys} and {values} bits"
        yield name, partial(packed_step, width, keys, values)
    wide_step = partial(packed_step, 256, 4, 4, torch.float32)  # what takes most shared memory
    yield "32 on 8 heads of 256, 4 and 4 bits, fp32", wide_step
    for bits in () if few else (4, 8, 3, 2):
        name = f"16 heads on 512 + 64, {bits} bits"
        yield name, partial(packed_latent_step, 16, 512, 64, {bits: (512, 64)})
    name = "32 heads on 448 + 64, 4 bits"
    yield name, partial(packed_latent_step, 32, 448, 64, {4: (448, 64)})
    mixed = {2: (40, 2), 3: (20, 0), 4: (60, 20), 8: (24, 10)}
    yield "9 heads on 144 + 32, 2 to 8 bits", partial(packed_latent_step, 9, 144, 32, mixed)

    for rank, heads in ((64, H), (512, 1)):
        coded = pages(rank, heads)
        read = half(H, rank, D), coded, cos, cos, lengths, 0.1, table, 0, half(H, D)
        yield f"32 heads on {heads} x {rank}", partial(rebuild_decode_attention, q, coded, *read)
    for width in (D, 256):
        read = half(2, Q, 100, width), *[half(2, H, 100, width)] * 2
        name = f"32 on 8 heads of {width}"
        yield f"{name}, 4 + 256", partial(streaming_attention, *read, 4, 256, 0.1)
        sinks = partial(streaming_attention, *read, 0, 100, 0.1, sink_logits=half(Q))
        yield f"{name}, 100, sink logits", sinks
    x, dt, A = half(2, 600, Q, D), torch.empty(2, 600, Q), torch.empty(Q)
    state = torch.empty(2, Q, D, D)
    yield "128 x 128", partial(ssd_chunked, x, dt, A, x, x, state, 1)
    yield "128 x 128, 2 segments", partial(ssd_chunked, x, dt, A, x, x, None, 2)
    step = x[:, 0], dt[:, 0], A, x[:, 0], x[:, 0], state
    yield "128 x 128", partial(ssd_step, *step)
    step = x[:, 0], x[:, 0], x[:, 0], dt[:, 0], dt[:, 0], state
    yield "128 x 128", partial(gated_delta_step, *step)
    window = half(2, 100, 3 * D), half(3 * D, 4), half(3 * D), half(2, 3 * D, 3)
    yield "384 channels", partial(causal_conv, *window)


def compiled(*, few: bool = False) -> Iterator[dict[str, Any]]:
    """Every kernel of every case, with what it needs."""
    made: list[tuple[str, Any]] = []

    def compile_only(function: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernel = function.run(*args, grid=grid, warmup=True, **options)
            made.append((function.fn.__name__, kernel))

        return launch

    driver.set_active(Hopper())
    decode.processors = lambda device: 132  # of an H100 or H200
    JITFunction.__getitem__ = compile_only
    for case, call in cases(few=few):
        call()
        for name, kernel in made:
            yield {"kernel": name, "case": case, **facts_of(kernel)}
        made.clear()


def main() -> None:
    assembler = ".".join(map(str, ptxas_version(90)))
    made = compiled(few="--few" in sys.argv)
    if "--json" in sys.argv:
        versions = {"target": "sm_90", "triton": triton.__version__, "ptxas": assembler}
        print(json.dumps({**versions, "kernels": list(made)}, indent=1))
        return
    table = Table(title=f"sm_90, triton {triton.__version__}, ptxas {assembler}")
    columns = "kernel", "case", "warps", "registers", "shared", "spilled", "loop", "products"
    for name in columns:
        table.add_column(name, justify="left" if name in ("kernel", "case") else "right")
    for kernel in made:
        table.add_row(*(str(kernel[name]) for name in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
