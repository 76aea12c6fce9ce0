"""Cases of `gpu.py` for what a model does besides attention: states, small steps, MLPs, norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.gpu_bench import BFLOAT16, Case, normal, rms_ratio
from kvtool.kernels.append import Encoder, append
from kvtool.kernels.decode_attention import merge
from kvtool.kernels.decode_attention import reference as decode_reference
from kvtool.kernels.gated_delta import gated_delta_step
from kvtool.kernels.gated_delta import reference as delta_reference
from kvtool.kernels.grouped_linear import grouped_linear
from kvtool.kernels.grouped_linear import reference as grouped_reference
from kvtool.kernels.hadamard import hadamard
from kvtool.kernels.rms_norm import add_rms_norm, rms_norm
from kvtool.kernels.ssd import reference as ssd_reference
from kvtool.kernels.ssd import ssd_chunked, ssd_step
from kvtool.kernels.swiglu import swiglu
from kvtool.runtime.fused import FusedMLP
from kvtool.runtime.stores import PAGE


def state_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """Mamba-2 as Llama-3-8B has it after conversion, a group per head; and Gated DeltaNet."""
    heads, size = 32, 128
    x, b, c = (normal(device, batch, tokens, heads, size) for _ in range(3))
    b, c = b * size**-0.5, c * size**-0.5
    dt = torch.rand(batch, tokens, heads, device=device) * 0.1
    a = -torch.rand(heads, device=device) - 0.5

    def error() -> float:
        part = [one[:1, :2048] for one in (x, dt)], [one[:1, :2048] for one in (b, c)]
        found = ssd_chunked(*part[0], a, *part[1])
        exact = ssd_reference.ssd_chunked(
            part[0][0].float(), part[0][1], a, *(one.float() for one in part[1])
        )
        return max(rms_ratio(*pair) for pair in zip(found, exact, strict=True))

    others: dict[str, list[Callable[[], Any]]] = {}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        pass
    else:

        def fla() -> Any:
            written = x * dt[..., None].to(BFLOAT16)
            return chunk_simple_gla(c, b, written, dt * a, scale=1.0, output_final_state=True)

        others["fla"] = [fla]
    chunk = 64
    yield Case(
        "ssd", "32 heads of 128 x 128, scan", batch, tokens,
        2.0 * 4 * x.numel(), 2.0 * batch * tokens * heads * (2 * chunk * size + 2 * size * size),
        [lambda: ssd_chunked(x, dt, a, b, c)], error, others,
    )  # fmt: skip
    rows = 64 if device.type == "cuda" else batch
    state = torch.randn(rows, heads, size, size, device=device)
    one = [normal(device, rows, heads, size) for _ in range(3)]
    step = torch.rand(rows, heads, device=device)

    def step_error() -> float:
        held = [state.clone() for _ in range(2)]
        found = ssd_step(one[0], step, a, one[1], one[2], held[0])
        wide = [x.float() for x in one]
        exact = ssd_reference.ssd_step(wide[0], step, a, wide[1], wide[2], held[1])
        return max(rms_ratio(found, exact), rms_ratio(*held))

    yield Case(
        "ssd", "32 heads of 128 x 128, step", rows, 1, 2.0 * state.nbytes, 6.0 * state.numel(),
        [lambda: ssd_step(one[0], step, a, one[1], one[2], state)], step_error,
    )  # fmt: skip
    unit, beta = one[1] / one[1].float().norm(dim=-1, keepdim=True).to(BFLOAT16), step.sigmoid()

    def delta_error() -> float:
        held = [state.clone() for _ in range(2)]
        found = gated_delta_step(one[2], unit, one[0], -step, beta, held[0])
        exact = delta_reference.gated_delta_step(
            one[2].float(), unit.float(), one[0].float(), -step, beta, held[1]
        )
        return max(rms_ratio(found, exact), rms_ratio(*held))

    yield Case(
        "gated_delta", "32 heads of 128 x 128, step", rows, 1, 2.0 * state.nbytes,
        7.0 * state.numel(),
        [lambda: gated_delta_step(one[2], unit, one[0], -step, beta, state)], delta_error,
    )  # fmt: skip


def small_cases(device: torch.device) -> Iterator[Case]:
    """What a decode step does besides attention."""
    rows, queries, heads, width = 64, 32, 8, 128
    k, v = (normal(device, rows, heads, width) for _ in range(2))
    q = normal(device, rows, queries, width)
    cos, sin = (torch.randn(rows, width, device=device).to(BFLOAT16) for _ in range(2))
    planes = [normal(device, rows + 1, heads, PAGE, width) for _ in range(2)]
    slots = torch.arange(rows, device=device) * PAGE + 17

    def error() -> float:
        found = append(k, v, cos, sin, *planes, slots, q)
        at = slots // PAGE, slots % PAGE
        real, imag = q.float().chunk(2, dim=-1)
        exact = q.float() * cos[:, None] + torch.cat((-imag, real), dim=-1) * sin[:, None]
        assert found is not None
        return rms_ratio(found, exact) + rms_ratio(planes[1][at[0], :, at[1]], v)

    yield Case(
        "append", "Llama-3-8B", rows, 1, 2.0 * 2 * rows * width * (queries + 2 * heads), 0,
        [lambda: append(k, v, cos, sin, *planes, slots, q)], error,
    )  # fmt: skip
    x = normal(device, 2**20 if device.type == "cuda" else 64, width)

    def hadamard_error() -> float:
        matrix = hadamard(torch.eye(width, device=device))
        return rms_ratio(hadamard(x), x.float() @ matrix)

    yield Case(
        "hadamard", "width 128", x.shape[0], 1, 2.0 * x.nbytes, x.numel() * 7.0,
        [lambda: hadamard(x)], hadamard_error,
    )  # fmt: skip


def coding_cases(device: torch.device, rows: int) -> Iterator[Case]:
    """What codes of half the width of Llama-3-8B take besides: written, met by queries, read."""
    queries, heads, width, rank = 32, 8, 128, 512
    k, v, q = (normal(device, rows, n, width) for n in (heads, heads, queries))
    cos, sin = (torch.randn(rows, width, device=device).to(BFLOAT16) for _ in range(2))
    planes = [normal(device, rows + 1, heads, PAGE, width) for _ in range(2)]
    slots, others = torch.arange(rows, device=device) * PAGE + 17, []
    for _ in range(4):  # a model has encoders enough to leave none of them in a cache
        weights = [normal(device, rank, heads * width).T for _ in range(2)]
        pages = [normal(device, rows + 1, 1, PAGE, rank) for _ in range(2)]
        others.append([Encoder(w, None, p) for w, p in zip(weights, pages, strict=True)])

    def write(codes: list[Encoder]) -> None:
        key_code, value_code = codes
        append(k, v, cos, sin, *planes, slots, q, key_code=key_code, value_code=value_code)

    def write_error() -> float:
        write(others[0])
        code = others[0][1]
        found = code.pages[slots // PAGE, 0, slots % PAGE]
        return rms_ratio(found, v.flatten(1).float() @ code.weight.float())

    yield Case(
        "append", "Llama-3-8B, codes of half the width", rows, 1,
        2.0 * (rows * width * (2 * queries + 4 * heads) + 2 * rank * (heads * width + rows)),
        4.0 * rows * heads * width * rank, [partial(write, codes) for codes in others], write_error,
    )  # fmt: skip
    for inner, outer in ((width, rank), (rank, width)):
        x = normal(device, rows, queries, inner)
        weights = [normal(device, heads, inner, outer) * inner**-0.5 for _ in range(4)]

        def batched(x: Tensor = x, weight: Tensor = weights[0]) -> Tensor:
            grouped = x.unflatten(1, (heads, -1)).transpose(0, 1)
            y = torch.matmul(grouped.flatten(1, 2), weight).view(*grouped.shape[:3], -1)
            return y.transpose(0, 1).flatten(1, 2)

        def error(x: Tensor = x, weight: Tensor = weights[0]) -> float:
            exact = grouped_reference.grouped_linear(x.float(), weight.float())
            return rms_ratio(grouped_linear(x, weight), exact)

        yield Case(
            "grouped_linear", f"Llama-3-8B, {inner} to {outer}", rows, 1,
            2.0 * (x.numel() // inner * (inner + outer) + weights[0].numel()),
            2.0 * rows * queries * inner * outer,
            [partial(grouped_linear, x, weight) for weight in weights], error,
            {"torch": [partial(batched, x, weight) for weight in weights]},
        )  # fmt: skip


def norm_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    """What comes before a product of so many rows, with the addition before that and without."""
    x, other = (normal(device, rows, width) for _ in range(2))
    weight, eps = normal(device, width), 1e-5

    def exact(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)

    def torch_norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def sum_error() -> float:
        both, normed = add_rms_norm(x, other, weight, eps)
        return max(rms_ratio(both, x.float() + other.float()), rms_ratio(normed, exact(both)))

    yield Case(
        "rms_norm", f"width {width}", rows, 1, 2.0 * x.nbytes, 0,
        [lambda: rms_norm(x, weight, eps)], lambda: rms_ratio(rms_norm(x, weight, eps), exact(x)),
        {"torch": [lambda: torch_norm(x)]},
    )  # fmt: skip
    yield Case(
        "rms_norm", f"width {width}, of a sum", rows, 1, 4.0 * x.nbytes, 0,
        [lambda: add_rms_norm(x, other, weight, eps)], sum_error,
        {"torch": [lambda: torch_norm(x + other)]},
    )  # fmt: skip


def swiglu_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    """What lies between the products of an MLP."""
    both = normal(device, rows, 2 * width)
    gate, up = (x.contiguous() for x in both.chunk(2, dim=-1))
    yield Case(
        "swiglu", f"width {width}", rows, 1, 1.5 * both.nbytes, 0, [lambda: swiglu(both)],
        lambda: rms_ratio(swiglu(both), F.silu(gate.float()) * up.float()),
        {"torch": [lambda: F.silu(gate) * up]},
    )  # fmt: skip


def mlp_cases(device: torch.device, rows: int, hidden: int, inner: int) -> Iterator[Case]:
    """A whole gated MLP, and the addition behind it."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner)
    with device:
        theirs = LlamaMLP(config).to(BFLOAT16).requires_grad_(False)
    ours, exact = FusedMLP(theirs), copy.deepcopy(theirs).float()
    x, residual = normal(device, rows, hidden), 0.1 * normal(device, rows, hidden)

    def error() -> float:
        return rms_ratio(ours.add_to(residual.clone(), x), residual.float() + exact(x.float()))

    yield Case(
        "mlp", f"{hidden} to {inner}", rows, 1, 2.0 * 3 * hidden * inner,
        2.0 * 3 * rows * hidden * inner, [lambda: ours.add_to(residual, x)], error,
        {"torch": [lambda: residual + theirs(x)]},
    )  # fmt: skip


def merge_cases(device: torch.device, rows: int) -> Iterator[Case]:
    """Two parts of Llama-3-8B, of which one lies head by head."""
    queries, width = 32, 128
    parts = [normal(device, rows, queries, width), normal(device, queries, rows, width)]
    parts[1] = parts[1].transpose(0, 1)
    masses = [torch.randn(rows, queries, device=device) for _ in range(2)]
    yield Case(
        "merge", "Llama-3-8B", rows, 1, 3.0 * parts[0].nbytes, 0, [lambda: merge(parts, masses)],
        lambda: rms_ratio(
            merge(parts, masses), decode_reference.merge([x.float() for x in parts], masses)
        ),
        {"torch": [lambda: decode_reference.merge(parts, masses)]},
    )  # fmt: skip
