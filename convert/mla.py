"""GQA to MLA: how a layer is fitted, and the tensors and the config that its target needs.

The method is that of `aware.py`, `transmla.py` or `exact.py`; `conversion.py` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate.statistics_file import Statistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.convert import aware, deepseek_v3, targets, transmla
from kvtool.convert.exact import exact_factors
from kvtool.convert.fitting import Conversion, ConvertedLayer, Fit
from kvtool.convert.options import ConvertOptions
from kvtool.convert.planning import save_dtype
from kvtool.factored import factor_tensors, factored_config
from kvtool.latent import LatentFactors
from kvtool.progress import Progress

SEARCH_WINDOWS = 4
"""How many of them serve to choose FreqFold."""


class ToMla(Conversion):
    """A conversion to MLA.

    Args:
        planned: What `planning.plan` said.
        scratch: Where the FreqFold that was chosen is kept.
    """

    def __init__(
        self,
        stream: LayerStream,
        options: ConvertOptions,
        replaced: list[str],
        planned: dict[str, Any],
        scratch: Path,
        report: Progress,
    ) -> None:
        super().__init__(stream, options, replaced)
        self.planned, self.scratch, self.report = planned, scratch, report

    def method(self, measured: Statistics | None, text: Tensor | None) -> Fit:
        factors = self._factors(measured, text)
        return lambda layer, _: ConvertedLayer(factors(layer))

    def _factors(
        self, measured: Statistics | None, text: Tensor | None
    ) -> Callable[[StreamedLayer], LatentFactors]:
        """How the factors of a layer come from its weights and statistics."""
        rope, layout = self.stream.rope, self.stream.layouts[0]
        heads, width = layout.kv_heads, layout.kv_heads * layout.head_dim
        rope_dim, rank = self.planned["rope_dim"], self.planned["rank"]
        if measured is None or text is None:
            return lambda layer: exact_factors(layout, rope)
        if self.options.method == "transmla":
            self.freqfold = fold = self._freqfold(text)

            def published(layer: StreamedLayer) -> LatentFactors:
                # Sinks included, as published: the latent holds them too.
                moment = measured.layer(layer.index).joint_moment
                gram = transmla.key_gram(moment[:width, :width], heads)
                basis = transmla.RotatedBasis(gram, rope_dim, fold)
                return transmla.latent_factors(moment, basis, rope, heads, rank)

            return published

        def components(index: int) -> aware.Components:
            return aware.rope_components(measured.layer(index), layout, rope)

        shared: Tensor | None = None
        if self.options.target == "vllm":
            shared = aware.one_per_frequency(layout.head_dim, rope_dim)
        elif self.options.target == "transformers":
            every = [components(i) for i in range(len(self.stream))]
            shared = aware.shared_by_layers(every, rope_dim // 2)

        def ours(layer: StreamedLayer) -> LatentFactors:
            found = components(layer.index)
            kept = shared
            if kept is None:
                kept = aware.most_damaging(found.damage, rope_dim // 2)
            output = layer.attention.o_proj.weight
            basis = aware.basis_of(found, kept)
            return aware.latent_factors(measured.layer(layer.index), basis, output, rope, rank)

        return ours

    def _freqfold(self, ids: Tensor) -> int:
        if self.options.freqfold != "auto":
            return int(self.options.freqfold)
        chosen = self.scratch / "freqfold"
        if not chosen.is_file():
            head_dim, rope_dim = self.stream.layouts[0].head_dim, self.planned["rope_dim"]
            candidates = targets.freqfold_candidates(head_dim, rope_dim)
            sample = ids[:SEARCH_WINDOWS]
            fold = transmla.choose_freqfold(self.stream, sample, rope_dim, candidates, self.report)
            chosen.write_text(str(fold))
        return int(chosen.read_text())

    def tensors(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        factors, dtype = converted.factors, save_dtype(self.stream.checkpoint, self.options)
        assert factors is not None
        prefix = f"model.layers.{index}."
        own = {f"self_attn.{name}": weight for name, weight in converted.weights.items()}
        if self.options.target == "kvtool":
            replaced = {prefix + name: weight.to(dtype) for name, weight in own.items()}
            return replaced | factor_tensors(index, factors, dtype)
        read = self.stream.checkpoint.read_prefix(prefix) | own

        def double(name: str) -> Tensor | None:
            return read[name].double() if name in read else None

        source = deepseek_v3.SourceLayer(
            query=read["self_attn.q_proj.weight"].double(),
            key=read["self_attn.k_proj.weight"].double(),
            value=read["self_attn.v_proj.weight"].double(),
            query_bias=double("self_attn.q_proj.bias"),
            key_bias=double("self_attn.k_proj.bias"),
            value_bias=double("self_attn.v_proj.bias"),
            input_norm=read["input_layernorm.weight"].double(),
        )
        layout = self.stream.layouts[index]
        eps = targets.latent_eps(self.stream.config, self.options.target)
        rank = self.planned["rank"]
        tensors = deepseek_v3.stock_layer(source, layout, factors, rank, eps)
        tensors |= {n: t for n, t in converted.weights.items() if n.startswith("o_proj.")}
        if layout.qkv_bias and not layout.output_bias:
            tensors["o_proj.bias"] = torch.zeros(layout.hidden_size)
        return {
            f"{prefix}self_attn.{name}": tensor.to(dtype).contiguous()
            for name, tensor in tensors.items()
        }

    def config(self, last: ConvertedLayer) -> dict[str, Any]:
        if self.options.target == "kvtool":
            return factored_config(self.stream.checkpoint.config)
        layout, planned = self.stream.layouts[0], self.planned
        assert last.factors is not None
        nope_dim = last.factors.key_up.shape[1]
        return deepseek_v3.stock_config(
            self.stream.config,
            layout,
            last.factors.inv_freq,  # the same in every layer
            self.stream.rope,
            planned["rank"],
            nope_dim,
            self.options.target,
            planned["attention_dtype"],
        )
