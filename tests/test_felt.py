"""What predictions feel of the past: gradients of far reads, and their sums, as written out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import WINDOWED
from _convert_tools import YARN, one_thread, random_ids
from _family_cases import GPT_OSS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.calibrate import cskv, far_reads, xkv
from kvtool.calibrate.far_reads import FarRead, WholeModel
from kvtool.calibrate.felt import Felt, feel
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import Behind, TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CalibrationError
from kvtool.rope import rotate

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LAYERS = {name: WINDOWED["gemma3_text"][1][name] for name in ("num_hidden_layers", "layer_types")}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "windows": WINDOWED["gemma3_text"],
    "sink logits": ("gpt_oss", GPT_OSS[1] | LAYERS),
}


def far_from(q: Tensor, k: Tensor, sink: int, window: int) -> Tensor:
    """`[M, S]`, the reads of tokens that are neither sinks nor in the window."""
    at = torch.arange(k.shape[2])
    return (at[-q.shape[2] :, None] - at >= window) & (at >= sink)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, scaling: float, far: Tensor,
    logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention `[1, Q, M, D]` that reads far tokens in copies of their own."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.where(far, grouped @ far_k[:, :, None].mT, grouped @ k[:, :, None].mT) * scaling
    at = torch.arange(k.shape[2])
    scores = scores.masked_fill(at[-q.shape[2] :, None] < at, -torch.inf)
    if logits is not None:  # a key of every head, with that score and no value
        own = logits.view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, own), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    read = (weights * far) @ far_v[:, :, None] + (weights * ~far) @ v[:, :, None]
    return read.flatten(1, 2)


@settings(derandomize=True, max_examples=60)
@given(
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 6),
    before=st.integers(0, 8),
    sink=st.integers(0, 16),
    window=st.integers(1, 16),
    joined=st.booleans(),
)
def test_far_reads_have_gradients_of_their_own(heads, group, queries, before, sink, window, joined):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    length = before + queries
    q, k, v = (random(1, n, t, 4) for n, t in ((heads * group, queries),) + ((heads, length),) * 2)
    zeros = [torch.zeros_like(x).requires_grad_() for x in (k, v)]
    upper = random(1, heads * group, queries, 4).detach()
    logits = random(heads * group).detach() if joined else None
    found = FarRead.apply(q, k, v, *zeros, 0.7, sink, window, logits)
    torch.testing.assert_close(found, causal_attention(q, k, v, 0.7, sink_logits=logits))
    copies = [x.detach() + zero for x, zero in zip((k, v), zeros, strict=True)]
    expected = written_out(q, k, v, *copies, 0.7, far_from(q, k, sink, window), logits)
    torch.testing.assert_close(found, expected)
    wanted = (q, k, v, *zeros)
    for one, other in zip(
        torch.autograd.grad((found * upper).sum(), wanted),
        torch.autograd.grad((expected * upper).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> Callable[[str], tuple[WholeModel, TailModel]]:
    """As it is measured, and as these tests write it out."""

    def get(name: str) -> tuple[WholeModel, TailModel]:
        family, overrides = MODELS[name]
        checkpoint = Checkpoint.open(str(tiny(family, **overrides)))
        return WholeModel(checkpoint), TailModel(LayerStream(checkpoint))

    return get


def felt_token_by_token(
    model: TailModel, windows: Tensor, offsets: list[int], end: int, kind: str, ring: Any, seed: int
) -> list[list[tuple[Tensor, Tensor]]]:
    """Of every window and layer that sees the whole past: y `[S, 2K]` and g `[S, 2K]`, where an
    error would be added.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ids, offset in zip(windows, offsets, strict=True):
        kept: list[tuple[Tensor, Tensor]] = []
        errors: list[tuple[Tensor, Tensor]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int, index: int) -> Tensor:
            cos, sin = model.ropes[index].tables(torch.arange(offset, offset + len(ids)))  # noqa: B023
            plain = k.detach()
            if kind == "unrotated":
                # RoPE is a rotation times a factor; its inverse is the transpose over the square.
                plain = rotate(plain, cos, -sin) / float((cos**2 + sin**2).mean())
            kept.append((plain, v.detach()))  # noqa: B023
            errors.append(tuple(torch.zeros_like(v).requires_grad_() for _ in "kv"))  # noqa: B023
            far_k, far_v = (x + error for x, error in zip(kept[-1], errors[-1], strict=True))  # noqa: B023
            if kind == "unrotated":
                far_k = rotate(far_k, cos, sin)
            # What the first tokens read is exact: only the predictions of the end are looked at.
            far = far_from(q, k, *ring)
            far[: len(far) - end] = False
            scaling, logits = model.layouts[index].scaling, model.sink_logits(index)
            return written_out(q, k, v, far_k, far_v, scaling, far, logits)

        # Nothing of the past is differentiated: what it is made of was read exactly.
        hidden, whole = model.embed(ids), Behind([], [], ids, offset=offset)
        for index in range(len(model.layers)):
            watched = index in model.planned_layers
            own = partial(attend, index=index) if watched else model.dense(index)
            hidden = model.layer(index, hidden, whole, own)
            hidden = torch.cat((hidden[:, :-end].detach(), hidden[:, -end:]), dim=1)
        said = model.predictions(hidden[:, -end:])[0]
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        wanted = [x for pair in errors for x in pair]
        grads = torch.autograd.grad(said.gather(1, drawn).sum(), wanted)
        rows = [
            tuple(
                torch.cat([x[0].transpose(0, 1).flatten(1) for x in pair], dim=1)[ring[0] :]
                for pair in (own, (grads[2 * i], grads[2 * i + 1]))
            )
            for i, own in enumerate(kept)
        ]
        found.append(rows)
    return found


@pytest.mark.parametrize("kind", ["rotated", "unrotated"])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_every_token_and_prediction(loaded, monkeypatch, name, kind):
    monkeypatch.setattr(far_reads, "END", 12)
    (whole, model), ring = loaded(name), (3, 5)
    groups = [model.planned_layers[:2], model.planned_layers[2:]]
    places = [[0, 1], list(range(2, len(model.planned_layers)))]
    windows, offsets = torch.stack([random_ids(40, seed=s) for s in (0, 1)]), [0, 70]
    found = feel(whole, windows, offsets, groups, kind, ring, 7, lambda *_: None)
    naive = felt_token_by_token(model, windows, offsets, 12, kind, ring, 7)
    width = 32
    for own, one in zip(places, found, strict=True):
        layers = len(own)
        second = metric = weighted = torch.zeros(2 * layers * width, 2 * layers * width)
        second, metric, weighted = (x.double() for x in (second, metric, weighted))
        weight = 0.0
        for rows in naive:
            # Keys of all layers first, then their values.
            y, g = (
                torch.cat([rows[i][which][:, part] for part in _HALVES for i in own], 1)
                for which in (0, 1)
            )
            for a, b in zip(y.double(), g.double(), strict=True):
                second = second + a.outer(a)
                metric = metric + b.outer(b)
                weighted = weighted + b.norm() * a.outer(a)
                weight += float(b.norm())
        assert (one.predictions, one.tokens) == (2 * 12, 2 * 37)
        for sums, expected in (
            (one.second, second),
            (one.metric, metric),
            (one.weighted, weighted),
        ):
            error = (sums - expected).norm() / expected.norm()
            assert error < 1e-4
        assert one.weight == pytest.approx(weight, rel=1e-4)


_HALVES = (slice(0, 32), slice(32, 64))


def test_xkv_of_one_layer_is_what_cskv_finds(loaded):
    (whole, model), ring = loaded("llama"), (4, 8)
    windows = torch.stack([random_ids(200, seed=s) for s in (0, 1)])
    found = feel(whole, windows, [0, 0], [[0], [1], [2]], "unrotated", ring, 0, lambda *_: None)
    for index, one in enumerate(found):
        alone = cskv.fit(_statistics(model, windows, index, ring[0]), 2)
        for part, fitted in xkv.fit(one).items():
            for rank in (3, 10, 20):
                ours, theirs = (
                    x.projection.decode[:, :rank] @ x.projection.encode[:rank]
                    for x in (fitted, alone[part])
                )
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
            torch.testing.assert_close(
                fitted.spectrum, alone[part].spectrum, rtol=1e-3, atol=1e-6 * fitted.spectrum[0]
            )


class _Joint:
    def __init__(self, second: Tensor, tokens: int) -> None:
        self.second, self.tokens = second, tokens


class _Layer:
    """As much of a layer's statistics as CSKV reads."""

    def __init__(self, joint: _Joint) -> None:
        self.joint = joint


def _statistics(model: TailModel, windows: Tensor, wanted: int, sink: int) -> Any:
    """Second moment of keys before RoPE and values, of what the layer's own projections give."""
    stages, second, tokens = model.layers[wanted].attention, torch.zeros(64, 64).double(), 0
    for ids in windows:
        seen: list[Tensor] = []
        handle = stages.qkv.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y[0]))
        hidden = model.embed(ids)
        with torch.no_grad():
            for index in range(wanted + 1):
                hidden = model.layer(index, hidden, None, model.dense(index))
        handle.remove()
        y = seen[0][sink:, -64:].double()
        second, tokens = second + y.T @ y, tokens + len(y)
    return _Layer(_Joint(second, tokens))


def test_a_model_that_overflows_is_refused(loaded):
    whole, _ = loaded("llama")
    whole.model.model.embed_tokens.weight.mul_(torch.inf)
    with pytest.raises(CalibrationError, match="predictions are not all numbers"):
        feel(whole, random_ids(40)[None], [0], [[0, 1, 2]], "rotated", (1, 2), 0, lambda *_: None)


def test_what_nothing_reads_is_not_felt(loaded, monkeypatch):
    """All tokens are in the window, so no error of a code can be seen."""
    monkeypatch.setattr(far_reads, "END", 12)
    ids = random_ids(40)[None]
    whole, layers = loaded("llama")[0], [[0, 1, 2]]
    (one,) = feel(whole, ids, [0], layers, "rotated", (0, 40), 0, lambda *_: None)
    assert isinstance(one, Felt)
    assert not one.metric.any()
    assert one.weight == 0
