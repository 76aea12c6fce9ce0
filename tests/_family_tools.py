"""A family as a small checkpoint, and what its runtime says of a text."""

import torch
from _family_cases import CASES, LATENTS

from kvtool.checkpoint import Checkpoint
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine


def open_case(tiny, name) -> Checkpoint:
    family, more = (CASES | LATENTS)[name]
    return Checkpoint.open(str(tiny(family, **more)))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def by_transformers(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers, `[T, V]`."""
    return checkpoint.load_transformers(torch.float32)(ids[None], use_cache=False).logits[0]


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To a small part of how much logits differ from each other."""
    assert float(wanted.std()) > 1e-2, "the model says the same of everything"
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.std()))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root of the mean square of what is wrong, as a share of how much logits differ."""
    return float((found - wanted).square().mean().sqrt() / wanted.std())


def logits(engine: Engine, ids: torch.Tensor, *pieces: int) -> torch.Tensor:
    """Of a text that comes in pieces, and then token by token."""
    cache, start, found = engine.new_cache(1, 8), 0, []
    for size in pieces:
        piece = ids[start : start + size]
        found.append(engine.extend(cache, piece, all_logits=True))
        start += size
    found += [engine.decode(cache, token[None]) for token in ids[start:]]
    return torch.cat(found)


def streaming(checkpoint: Checkpoint, sink: int, window: int) -> Plan:
    """All heads that see the whole past stream."""
    layers = [
        layer if layer.kept else LayerPlan((True,) * base_of(checkpoint).kv_heads, sink, window)
        for layer in whole_layers(checkpoint)
    ]
    return Plan(base_of(checkpoint), tuple(layers))
