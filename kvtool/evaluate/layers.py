"""What each decoder layer costs, and what it alone breaks.

Layer by layer, the original runs a short text with one of its layers taken from the model under
test: the prompt is prefilled, the rest is fed through the cache, and the predictions of the rest
are judged. The walk holds the original's hidden states at the entrance of one layer at a time, and
only the layers above it run once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvtool.divergence import kl_divergence
from kvtool.evaluate.protocol import SLICE, CacheSize
from kvtool.factors import layer_inputs
from kvtool.layout import decoder_layers
from kvtool.plan import Plan
from kvtool.rope import rotate
from kvtool.runtime.cache import KVCache
from kvtool.runtime.layers import LatentRuntimeAttention, Step, through

if TYPE_CHECKING:
    from kvtool.runtime import Engine

Parts = tuple[Tensor, Tensor]
"""Hidden states of the prompt and of the rest: `[1, P, hidden]`, `[1, C, hidden]`."""
_Stored = tuple[Any, list[tuple[Tensor, Tensor] | None]]
"""The store of a layer, and what each step has seen of it, see `Step`."""


@dataclass(frozen=True)
class Damage:
    """What one decoder layer of the model under test does to the original, over C positions.

    Attributes:
        kl: KL(original || original with this layer), nats per position; 0 for an equal layer.
        output_error: Relative error of the attention's output, ||a - a'|| / ||a||, given what the
            original gives to the layer.
        score_error: The same of its scores before the softmax, each query's centred over the keys
            that it sees: a constant does nothing to a softmax. None where the layer keeps its keys,
            or has another number of query heads.
    """

    kl: float
    output_error: float
    score_error: float | None


@dataclass(frozen=True)
class LayerResult:
    """Bytes of one layer's cache, see `CacheSize`, and its :class:`Damage` where measured."""

    bytes_per_token_bf16: float
    constant_bytes: float
    base_bytes_per_token_bf16: float | None = None
    kl: float | None = None
    score_error: float | None = None
    output_error: float | None = None


def layer_results(
    sizes: Sequence[CacheSize], base: Sequence[CacheSize] | None, damage: Sequence[Damage] | None
) -> list[LayerResult]:
    """What was measured of each layer; `base` and `damage` of as many layers, or None."""
    return [
        LayerResult(
            size.bytes_per_token_bf16,
            size.constant_bytes,
            None if base is None else base[i].bytes_per_token_bf16,
            **({} if damage is None else asdict(damage[i])),
        )
        for i, size in enumerate(sizes)
    ]


def comparable(engine: Engine, base: Engine) -> bool:
    """Whether each layer of one model can take the place of the same layer of the other."""
    ours, theirs = ((len(one.attentions), one.config.hidden_size) for one in (engine, base))
    return ours == theirs


def separable(engine: Engine) -> bool:
    """Whether each layer can run without its neighbours: a shared code needs what all have seen."""
    return engine.plan is None or all(code.layers == 1 for code in engine.plan.codes)


def prompt_length(plan: Plan | None, least: int, most: int) -> int:
    """Tokens of a prompt of which every head of a plan drops something, or does not read it: half,
    if `most` allows.
    """
    kept = [0]
    for layer, ring in zip(plan.layers, plan.rings, strict=True) if plan is not None else ():
        kept += [ring.sink + ring.window, *(budget or 0 for budget in layer.budgets)]
        kept.append(0 if layer.sparse is None else layer.sparse.tokens)
    return min(max(least, 2 * max(kept)), most)


@torch.inference_mode()
def layer_damage(engine: Engine, base: Engine, ids: Tensor, prefill: int) -> Iterator[Damage]:
    """Puts each layer of `engine` into `base` in turn; the two are :func:`comparable`,
    and `engine` is :func:`separable`.

    Args:
        ids: `[P + C]`, the text.
        prefill: P.
    """
    ids = ids.to(base.device)[None]
    ours, theirs = _Walk(engine, ids, prefill), _Walk(base, ids, prefill)
    embedded = base.embed(ids)
    hidden: Parts = (embedded[:, :prefill], embedded[:, prefill:])
    expected = _log_probabilities(base, theirs.run(hidden, 0))
    for i, attention in enumerate(engine.attentions):
        with _watched(base.attentions[i]) as true, _watched(attention) as tested:
            after, changed = theirs.run(hidden, i, i + 1), ours.run(hidden, i, i + 1)
        scores = None
        if isinstance(attention, LatentRuntimeAttention) and engine.plan is None:
            right, wrong = theirs.scores(i, true.hidden), ours.scores(i, tested.hidden)
            scores = _relative_error(right, wrong) if right.shape == wrong.shape else None
        kl = 0.0
        if not all(map(torch.equal, after, changed)):
            # What this writes into the stores above, the walk itself will write over.
            own = theirs.stored(i)
            theirs.put(i, ours.stored(i))
            kl = _kl(expected, _log_probabilities(base, theirs.run(changed, i + 1)))
            theirs.put(i, own)
        ours.put(i, theirs.stored(i))  # a later layer that reads this one is judged by itself
        yield Damage(kl, _relative_error(true.output, tested.output), scores)
        hidden = after


class _Walk:
    """Layers of a model, each with its own store, as hidden states of a text come to them."""

    def __init__(self, engine: Engine, ids: Tensor, prefill: int) -> None:
        self.engine, length = engine, ids.shape[1]
        self.layers = decoder_layers(engine.model)
        # Contiguous ones, also where the engine has pages: planes are read as they lie.
        stores = [attention.new_store(1, length) for attention in engine.attentions]
        self.stores = KVCache(stores, 1).stores
        self.steps = [self._step(0, prefill, prefill), self._step(prefill, length, None)]
        inputs = layer_inputs(engine.model, ids, engine.embed(ids))
        if inputs is not None:
            self.steps[0].inputs, self.steps[1].inputs = inputs[:, :prefill], inputs[:, prefill:]

    def stored(self, index: int) -> _Stored:
        """What a layer that has run leaves for others that read it."""
        return self.stores[index], [step.seen.get(index) for step in self.steps]

    def put(self, index: int, stored: _Stored) -> None:
        """Puts what another walk's layer has left in that one's place."""
        self.stores[index] = stored[0]
        for step, seen in zip(self.steps, stored[1], strict=True):
            step.seen.pop(index, None)
            if seen is not None:
                step.seen[index] = seen

    def _step(self, start: int, end: int, prompt: int | None) -> Step:
        positions = torch.arange(start, end, device=self.engine.device)[None]
        tables = self.engine.tables(positions)
        return Step(self.stores, 0, [start], [end], prompt, tables, positions=positions)

    def run(self, hidden: Parts, first: int, end: int | None = None) -> Parts:
        """Through the layers from `first` to `end`; their stores start anew with the prompt."""
        prompt, rest = hidden
        for layer in self.layers[first:end]:
            prompt, rest = (
                through(layer, *x) for x in zip((prompt, rest), self.steps, strict=True)
            )
        return prompt, rest

    def scores(self, index: int, hidden: Tensor) -> Tensor:
        """Scores `[Q, C, P + C]` fp32 of a layer that has just run, each query's centred.

        Args:
            hidden: `[1, C, hidden]`, what its attention was given last.
        """
        attention: Any = self.engine.attentions[index]
        stages, planes = attention.stages, self.stores[index].planes
        cos, sin = self.steps[1].tables[attention.table]
        if isinstance(attention, LatentRuntimeAttention):
            scaling, k = stages.scaling, planes["latents"]  # the one key head of all queries
            q = stages.query_and_compress(hidden)[0][0].transpose(0, 1)  # [Q, C, d_q]
            absorb = attention.absorb_query[:, None]
            absorbed = torch.matmul(q.unflatten(0, (len(absorb), -1)), absorb)
            latent, shared = absorbed.split([stages.rank, stages.rope_dim], dim=-1)
            q = torch.cat((latent, rotate(shared, cos, sin)), dim=-1)
        else:
            scaling, k = stages.layout.scaling, planes["keys"][0]
            q, new, _ = stages.project(hidden)
            q, new = stages.normalise(q, new)
            q = stages.temper(q, self.steps[1].positions)
            q, _ = stages.rotate(q, new, cos[:, None], sin[:, None])
            q = q[0].unflatten(0, (len(k), -1))
        scores = torch.matmul(q.float(), k.float()[:, None].mT)  # [H, Q/H, C, P + C]
        return _centred(scaling * scores.flatten(0, 1))


@dataclass
class _Call:
    """The last call of an attention module: what it was given and what it gave."""

    hidden: Tensor
    output: Tensor


@contextmanager
def _watched(attention: nn.Module) -> Iterator[_Call]:
    call = _Call(torch.empty(0), torch.empty(0))

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        call.hidden = kwargs["hidden_states"]
        call.output = result if isinstance(result, Tensor) else result[0]

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


def _centred(scores: Tensor) -> Tensor:
    """Scores `[Q, C, S]` less their mean over the keys that each query sees, 0 at the others."""
    queries, keys = scores.shape[1:]
    seen = torch.ones(queries, keys, device=scores.device).tril(keys - queries)
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (scores - mean) * seen


def _relative_error(true: Tensor, other: Tensor) -> float:
    """||true - other||_F / ||true||_F, and 0 between equals."""
    true = true.double()
    error = (true - other.double()).norm()
    return float(error / true.norm()) if error else 0.0


def _log_probabilities(engine: Engine, hidden: Parts) -> list[Tensor]:
    """Of the rest of the text, `[n, V]` float64 by slices of positions."""
    logits = engine.logits(hidden[1])[0].cpu()
    return [part.double().log_softmax(-1) for part in logits.split(SLICE)]


def _kl(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean over all positions of KL(expected || found)."""
    total = sum(kl_divergence(p, q).sum().item() for p, q in zip(expected, found, strict=True))
    return total / sum(map(len, expected))
