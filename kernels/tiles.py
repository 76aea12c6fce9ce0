"""What Triton kernels of several operations share. Imported only where they run."""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "dependent_launch",
    "dot",
    "gdc_launch_dependents",
    "gdc_wait",
    "has_dependent_launch",
    "has_sound_assembler",
    "load_columns",
    "load_tile",
    "lying_together",
    "precision",
    "processors",
    "ptxas_version",
    "rounded",
    "store_columns",
    "tiles_of",
    "weigh",
    "zeros",
]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """`a @ b + c` in float32.

    The interpreter takes the bits of bfloat16 for integers, so there numbers are widened first.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 in another type, to nearest.

    The interpreter cuts bfloat16 off, which adds up, and halves powers of two in e4m3.
    """
    if INTERPRETED and (DTYPE.is_bf16() or DTYPE.is_fp8e4nv()):
        LOST: tl.constexpr = 16 if DTYPE.is_bf16() else 20  # bits
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << LOST - 1) - 1 + ((bits >> LOST) & 1)
        near = (bits & (-1 << LOST)).to(tl.float32, bitcast=True)
        if DTYPE.is_fp8e4nv():  # small numbers lie 2^-9 apart, as floats around 2^14 do
            near = tl.where(tl.abs(x) < 2**-6, (x + 24576.0) - 24576.0, near)
        x = near
    return x.to(DTYPE)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of float32; both may come out of a tuple."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def weigh(scores, top, AXIS: tl.constexpr):
    """A step of a softmax along an axis, in powers of two (arXiv 1805.02867, algorithm 3).

    Args:
        top: The largest score so far; -inf as long as there is none.

    Returns:
        The weights of further scores, what sums of older ones shrink by, and the new top.
    """
    new_top = tl.maximum(top, tl.max(scores, AXIS))
    safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf would be NaN
    return tl.exp2(scores - tl.expand_dims(safe_top, AXIS)), tl.exp2(top - safe_top), new_top


@triton.jit
def load_columns(plane, offsets, columns, inside, width, WHOLE: tl.constexpr):
    """Columns of some rows `[N, W]`, zeros where there is nothing.

    Args:
        offsets: `[N]`, where the rows begin; inside: `[N]`, which of them there are.
        columns: `[W]`, of which those below `width` exist.
        WHOLE: All of them do.
    """
    at = plane + offsets[:, None] + columns[None, :]
    if WHOLE:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def load_tile(
    plane, offsets, inside, START: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """SIZE columns from START on of some rows, see :func:`load_columns`; `[N, COLUMNS]`."""
    columns = tl.arange(0, COLUMNS)
    return load_columns(plane + START, offsets, columns, inside, SIZE, COLUMNS == SIZE)


@triton.jit
def store_columns(plane, offsets, columns, inside, width, x):
    """The other way round."""
    at = plane + offsets[:, None] + columns[None, :]
    tl.store(at, x, mask=inside[:, None] & (columns < width)[None, :])


def precision(dtype: torch.dtype) -> str:
    """How a dot product multiplies: float32 as it is, not in TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tiles_of(width: int) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, whose sum holds a width with little to spare.

    `tl.dot` takes no fewer than 16 columns.
    """
    whole = max(16, 1 << (width.bit_length() - 1))
    rest = width - whole
    return (whole, 0) if rest <= 0 else (whole, max(16, triton.next_power_of_2(rest)))


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_sound_assembler(device: torch.device) -> bool:
    """Whether kernels of any size come out right; ptxas before 12.9 gets some products wrong, see
    `rebuild_attention/README.md`.
    """
    if device.type != "cuda":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return ptxas_version(10 * major + minor) >= (12, 9)


@functools.cache
def ptxas_version(arch: int) -> tuple[int, ...]:
    """Of the assembler that Triton takes for sm_`arch`, as `(12, 9)`; empty if that is unknown."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return tuple(int(part) for part in get_ptxas(arch).version.split("."))
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError):
        return ()


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """How a kernel with a constant `PDL` is launched while the one before it ends, where it can."""
    overlap = has_dependent_launch(device)
    return {"PDL": True, "launch_pdl": True} if overlap else {"PDL": False}


def lying_together(x: torch.Tensor) -> torch.Tensor:
    """As it is, where the numbers of the last axis are neighbours; on a CPU they may not be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; one where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
