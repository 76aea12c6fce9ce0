"""ASVD (arXiv 2312.05821): the projections' SVD with inputs scaled by their mean size.

W S = U Σ Vᵀ with S = diag(mean |x|)^α is cut to rank r, and W replaced by (U_r Σ_r V_rᵀ) S⁻¹, that
is, by U_r U_rᵀ W: a projection of the layer's own keys or values, found without looking at them.
Where the inputs' full second moment takes the place of S², it is CSKV's optimum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.calibrate.cskv import principal
from kvtool.calibrate.stream import BATCH, LayerStream
from kvtool.codes import Fitted, Part, Projection
from kvtool.errors import UnsupportedModelError
from kvtool.layout import AttentionLayout

ALPHA = 0.5
"""Of the paper and its code."""


def check(layouts: Sequence[AttentionLayout]) -> None:
    """Raises UnsupportedModelError where keys are normed behind their projection."""
    if any(layout.qk_norm for layout in layouts):
        raise UnsupportedModelError(
            "asvd codes what projections give, and this model norms its keys behind them"
        )


@torch.inference_mode()
def fit(stream: LayerStream, windows: Tensor) -> dict[int, dict[Part, Fitted]]:
    """Keys and values of every layer that has them, from `windows [N, S]` of token ids.

    Raises:
        UnsupportedModelError: Keys are normed behind their projection.
    """
    check(stream.layouts)
    hidden = stream.embed(windows)
    found: dict[int, dict[Part, Fitted]] = {}
    for index in range(len(stream)):
        layer = stream.layer(index)
        if layer.mixer is not None:
            layer.run(hidden, layer.mixer, BATCH)
            continue
        size = torch.zeros(layer.attention.layout.hidden_size, dtype=torch.float64)
        exact = stream.exact_attention(layer)

        def watched(x: Tensor, size: Tensor = size, exact=exact) -> Tensor:  # type: ignore[no-untyped-def]
            size += x.abs().double().sum(dim=(0, 1))
            output: Tensor = exact(x)
            return output

        layer.run(hidden, watched, BATCH)
        _, *parts = layer.attention.qkv.weight.double().split(layer.attention.sizes)
        biases = [torch.zeros(len(x), dtype=torch.float64) for x in parts]
        if layer.attention.layout.qkv_bias:
            _, *biases = layer.attention.qkv.bias.double().split(layer.attention.sizes)
        scale = (size / windows.numel()) ** (2 * ALPHA)
        fitted = [_projection(w, scale, bias) for w, bias in zip(parts, biases, strict=True)]
        found[index] = {"keys": fitted[0], "values": fitted[1]}
    return found


def _projection(weight: Tensor, scale: Tensor, bias: Tensor) -> Fitted:
    """Of `weight [K, hidden]` with squared input sizes `scale [hidden]`."""
    fitted = principal((weight * scale) @ weight.T)
    encode, decode = fitted.projection.encode, fitted.projection.decode
    return Fitted(Projection(encode, decode, bias), fitted.spectrum)
