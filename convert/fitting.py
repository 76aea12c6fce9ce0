"""Fits a :class:`ConvertedLayer` for every layer, and keeps it for a killed run to go on.

A method that reads the statistics alone needs no text here. `aware` also solves each output
projection on the calibration text: two copies of its hidden states go through the layers, one as
the original has them, one as the layers converted so far do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool.attention import DenseAttention, GroupedQueryAttention
from kvtool.calibrate.statistics_file import Statistics
from kvtool.calibrate.stream import Attention, LayerStream, StreamedLayer
from kvtool.convert import aware
from kvtool.convert.artifact import is_replaced
from kvtool.convert.options import ConvertOptions
from kvtool.latent import FactoredAttention, LatentFactors
from kvtool.progress import Progress
from kvtool.rope import Rope


@dataclass(frozen=True)
class ConvertedLayer:
    """What a conversion makes of one attention layer, independent of any engine.

    Attributes:
        factors: None where it caches keys and values, of fewer heads.
        weights: Of the layer's own projections and norms that it replaces, by name relative to
            `self_attn`; and scales for an fp8 cache.
    """

    factors: LatentFactors | None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes all tensors as they are."""
        parts = {}
        if self.factors is not None:
            parts = {f.name: getattr(self.factors, f.name) for f in fields(LatentFactors)}
        parts |= {_WEIGHTS + name: weight for name, weight in self.weights.items()}
        save(parts, file, {})

    @classmethod
    def load(cls, file: Path) -> ConvertedLayer:
        """Reads what `save` wrote."""
        with safe_open(file, "pt") as stored:
            parts = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        weights = {n.removeprefix(_WEIGHTS): t for n, t in parts.items() if n.startswith(_WEIGHTS)}
        factors = {name: part for name, part in parts.items() if not name.startswith(_WEIGHTS)}
        return cls(LatentFactors(**factors) if factors else None, weights)


_WEIGHTS = "weights."

Fit = Callable[[StreamedLayer, Tensor], ConvertedLayer]
"""Fits a layer, given the original's hidden states `[N, T, hidden]` of the text before it."""


def save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that is either whole or not there."""
    unfinished = file.with_suffix(".unfinished")
    named = {name: t.contiguous() for name, t in tensors.items()}
    save_file(named, unfinished, metadata or None)  # it cannot read a file of neither
    unfinished.replace(file)


def converted_stages(
    own: GroupedQueryAttention, converted: ConvertedLayer, rope: Rope
) -> FactoredAttention | DenseAttention:
    """The stages of an attention module after its conversion; the module stays as it is."""
    own = copy.deepcopy(own)
    own.replace_weights(converted.weights)
    if converted.factors is None:
        return DenseAttention(own, rope)
    return FactoredAttention(own, converted.factors)


def converted_attention(layer: StreamedLayer, converted: ConvertedLayer, rope: Rope) -> Attention:
    """The layer as its conversion defines it, in fp32, over whole windows."""
    stages = converted_stages(layer.attention, converted, rope)
    return lambda hidden: stages.output(stages.context(hidden, rope.scale))


class Conversion:
    """What one kind of conversion makes of layers, and of the checkpoint around them.

    Attributes:
        by_statistics: Layers are fitted by statistics of the model; else by the hidden states of
            the text, which a fit takes through its layer.
        source: Whose tensors and files stay, but for those that are replaced.
        replaced: Parts of an attention module that change.
        freqfold: F, where TransMLA uses one.
    """

    by_statistics = True
    freqfold: int | None = None

    def __init__(self, stream: LayerStream, options: ConvertOptions, replaced: list[str]) -> None:
        self.stream, self.options, self.replaced = stream, options, replaced
        self.source = stream.checkpoint

    def method(self, measured: Statistics | None, text: Tensor | None) -> Fit:
        """How a layer is fitted, given statistics and the calibration text `[N, T]`."""
        raise NotImplementedError  # pragma: no cover

    def tensors(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        """The tensors of one layer under their full names, in the dtypes of the output."""
        raise NotImplementedError  # pragma: no cover

    def config(self, last: ConvertedLayer) -> dict[str, Any]:
        """`config.json` of the output; `last` is its last layer."""
        raise NotImplementedError  # pragma: no cover

    def check(self, layers: Iterable[ConvertedLayer]) -> None:
        """Told all layers when they are fitted; may refuse them."""

    def run(self, index: int, converted: ConvertedLayer, states: Tensor) -> None:
        """Takes hidden states `[N, T, hidden]` through a layer as it is converted, in place."""
        layer = self.stream.layer(index)
        layer.run(states, converted_attention(layer, converted, self.stream.rope))

    def stays(self, name: str) -> bool:
        """Whether a tensor of the source is one of the output's, unless a layer has it anew."""
        return not is_replaced(name, self.replaced)

    def write_beside(self, folder: Path) -> None:
        """Writes what the output has in files of its own."""


def fitted_file(folder: Path, index: int) -> Path:
    """Where the :class:`ConvertedLayer` of a layer is kept."""
    return folder / f"fitted-{index:05d}.safetensors"


def healed_file(folder: Path, index: int) -> Path:
    """The same, of a layer after healing."""
    return folder / f"healed-{index:05d}.safetensors"


def fit_layers(
    stream: LayerStream,
    fit: Fit,
    folder: Path,
    report: Progress,
    text: Tensor | None = None,
    refit: bool = True,
) -> None:
    """Fits every layer that is not in `folder` yet.

    Args:
        text: `[N, T]`, for the layers' hidden states; None leaves them empty.
        refit: Solve the output projections anew on the text; without it, `fit` itself takes the
            hidden states through the layer.
    """
    total, states = len(stream), folder / "streams.safetensors"
    first = sum(fitted_file(folder, i).is_file() for i in range(total))
    original = converted = torch.empty(0)
    if text is not None and states.is_file():
        with safe_open(states, "pt") as stored:
            first = int(stored.metadata()["next_layer"])
            original, converted = (stored.get_tensor(n) for n in ("original", "converted"))
    elif text is not None:
        first, original = 0, stream.embed(text)
        converted = original.clone() if refit else converted
    report("fitting", first, total)
    for index in range(first, total):
        layer = stream.layer(index)
        fitted = fit(layer, original)
        if text is not None and refit:
            stages = converted_stages(layer.attention, fitted, stream.rope)
            weight = aware.refit_output(stream, layer, stages, original, converted)
            weights = {"o_proj.weight": weight}
            if (bias := layer.attention.o_proj.bias) is not None:
                weights["o_proj.bias"] = bias.detach()
            fitted = replace(fitted, weights={**fitted.weights, **weights})
        fitted.save(fitted_file(folder, index))
        if text is not None:
            position = {"next_layer": str(index + 1)}
            save({"original": original, "converted": converted}, states, position)
        del layer
        report("fitting", index + 1, total)
