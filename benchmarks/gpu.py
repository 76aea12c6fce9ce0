"""Checks and times every kernel on a GPU, and decoding from end to end, in one call.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json        # inside 9 minutes
    TRITON_INTERPRET=1 python -m benchmarks.gpu --out FILE --tiny     # does it all work?

How a case is checked and timed is said in `gpu_bench.py`; the cases are in `gpu_attention.py` and
`gpu_layers.py`, decoding in `gpu_end_to_end.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu_attention import (
    code_cases,
    decode_cases,
    flex_cases,
    float_cases,
    latent_cases,
    packed_cases,
    packed_latent_cases,
    split_cases,
    streaming_cases,
)
from benchmarks.gpu_bench import Case, asked_for, show
from benchmarks.gpu_end_to_end import end_to_end
from benchmarks.gpu_layers import (
    coding_cases,
    merge_cases,
    mlp_cases,
    norm_cases,
    small_cases,
    state_cases,
    swiglu_cases,
)


def main() -> None:
    """Parses and measures."""
    bench, tiny = asked_for(__doc__)
    device = bench.device
    grouped = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}
    latents = {
        "SmolLM2-135M, MLA at 50 %": (9, 160, 32),
        "16 heads, 512 + 64": (16, 512, 64),
        "Llama-3-8B, MLA at 25 %": (32, 448, 64),
        "Llama-3-8B, MLA at 50 %": (32, 960, 64),
        "DeepSeek-V3": (128, 512, 64),
    }
    packed_latents = {name: latents[name] for name in list(latents)[1:3]}
    groups: list[Iterator[Case]]
    if tiny:
        groups = [
            decode_cases(device, {"SmolLM2-135M": (9, 3, 64)}, [(2, 100)]),
            float_cases(device, {"SmolLM2-135M": (9, 3, 64)}, [(2, 100)]),
            latent_cases(device, {"SmolLM2-135M": (9, 160, 32)}, [(2, 100)]),
            split_cases(device, 1, 100),
            code_cases(device, 1, 100),
            packed_cases(device, 1, 200),
            packed_latent_cases(device, {"SmolLM2-135M": (9, 160, 32)}, [(2, 200)]),
            small_cases(device),
            coding_cases(device, 2),
            norm_cases(device, 2, 256),
            swiglu_cases(device, 2, 256),
            mlp_cases(device, 2, 64, 96),
            merge_cases(device, 2),
            state_cases(device, 1, 100),
            streaming_cases(device, 100),
        ]
    else:
        sizes = [(b, n) for n in (4096, 32768, 131072) for b in (1, 8, 64)]
        short = [(1, 4096), (64, 4096), (1, 32768), (8, 32768), (64, 32768), (8, 131072)]
        groups = [
            decode_cases(device, grouped, sizes),
            float_cases(device, grouped, [(1, 32768), (8, 32768), (64, 32768)]),
            split_cases(device, 8, 32768),
            code_cases(device, 8, 32768),
            packed_cases(device, 8, 32768),
            latent_cases(device, latents, short),
            packed_latent_cases(device, packed_latents, short[2:]),
            small_cases(device),
            *(norm_cases(device, rows, 4096) for rows in (1, 8, 64, 4096)),
            *(norm_cases(device, rows, 128) for rows in (256, 2**17)),
            *(swiglu_cases(device, rows, 14336) for rows in (1, 8, 64, 8192)),
            *(mlp_cases(device, rows, 4096, 14336) for rows in (1, 8, 64, 8192)),
            *(merge_cases(device, rows) for rows in (1, 8, 64)),
            *(coding_cases(device, rows) for rows in (1, 8, 64)),
            state_cases(device, 4, 8192),
            streaming_cases(device, 32768),
        ]
    try:
        for cases in groups:
            with bench.going_on("cases"):
                for case in cases:
                    if bench.late(15):
                        break
                    bench.measure(case)
                    del case
        with bench.going_on("end to end"):
            if tiny:
                end_to_end(bench, 2, 2, 100, shrink=16)
            else:
                end_to_end(bench, 32, 8, 32768)
        for batch in () if tiny else (1, 8):
            with bench.going_on("flex_attention"):
                for case in flex_cases(device, batch, 32768):
                    if not bench.late(20):
                        bench.measure(case)
    finally:
        show(bench)


if __name__ == "__main__":
    main()
