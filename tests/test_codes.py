"""Codes: exact at full width, the same however tokens arrive, and as many bytes as planned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _convert_tools import one_thread, random_ids
from torch import Tensor

from kvtool.calibrate import projections
from kvtool.calibrate.projections import METHODS, ProjectionOptions, calibrate_projections
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.checkpoint import Checkpoint
from kvtool.errors import PlanError, UsageError
from kvtool.evaluate.layers import prompt_length
from kvtool.plan import CodeKind, CodePlan, LayerPlan, Plan, base_of, code_shapes
from kvtool.runtime import Engine

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

SINK, WINDOW = 3, 7
LENGTH = 48
KINDS: tuple[CodeKind, ...] = ("rotated", "unrotated")


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny("llama", num_key_value_heads=2)))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(LENGTH)


def coded(checkpoint: Checkpoint, kind: CodeKind, share: float = 1.0, **ring: int) -> Plan:
    """A plan with random invertible codes, whose means are not zero."""
    base = base_of(checkpoint)
    width = base.kv_heads * base.head_dim
    kept = max(1, int(share * width))
    code = CodePlan(kind, kept, kept, **({"sink": SINK, "window": WINDOW} | ring))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {}
    for index in range(base.layers):
        for name, shape in code_shapes(index, base).items():
            tensors[name] = torch.zeros(shape)
        for name in ("keys", "values"):
            encode = torch.eye(width, dtype=torch.float64) + 0.3 * random(width, width) / width**0.5
            tensors[f"layers.{index}.{name}.encode"] = encode.float()
            tensors[f"layers.{index}.{name}.decode"] = torch.linalg.inv(encode).float()
            tensors[f"layers.{index}.{name}.mean"] = random(width).float()
    layer = LayerPlan((False,) * base.kv_heads, code=code)
    return Plan(base, (layer,) * base.layers, tensors=tensors)


def token_by_token(engine: Engine, ids: Tensor, prompt: int = 1) -> Tensor:
    cache = engine.new_cache(1, len(ids))
    first = engine.extend(cache, ids[:prompt], all_logits=True)
    return torch.cat((first, *(engine.decode(cache, token[None]) for token in ids[prompt:])))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_at_full_width_nothing_is_lost(tiny, kind, family, prefill):
    checkpoint = Checkpoint.open(str(tiny(family)))
    ids = random_ids(LENGTH)
    expected = token_by_token(Engine.load(checkpoint), ids)
    plan = replace(coded(checkpoint, kind), prefill=prefill)
    found = token_by_token(Engine.load(checkpoint, plan=plan), ids, prompt=20)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ring", [(0, 1), (1, 1), (SINK, WINDOW), (4, 60)])
def test_how_tokens_arrive_does_not_matter(llama, ids, kind, ring):
    sink, window = ring
    plan = replace(coded(llama, kind, 0.5, sink=sink, window=window), prefill="streamed")
    engine = Engine.load(llama, plan=plan)
    expected = token_by_token(engine, ids)
    for pieces in ((LENGTH,), (1, 30, 17), (SINK + WINDOW, 1, LENGTH - SINK - WINDOW - 1)):
        cache = engine.new_cache(1, 8)
        parts = [engine.extend(cache, piece, all_logits=True) for piece in ids.split(pieces)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_prompt_is_read_exactly_and_coded_behind_its_end(llama, ids, kind):
    plan = coded(llama, kind, 0.5)
    engine = Engine.load(llama, plan=plan)
    cache = engine.new_cache(1, LENGTH)
    found = engine.extend(cache, ids[:-1], all_logits=True, chunk=10)
    dense = Engine.load(llama)
    exact = dense.extend(dense.new_cache(1, LENGTH), ids, all_logits=True)
    torch.testing.assert_close(found, exact[:-1], rtol=1e-4, atol=1e-5)
    lossy = engine.decode(cache, ids[-1:])[0]
    assert (lossy - exact[-1]).abs().max() > 1e-3
    assert cache.allocated_bytes == plan.cache_bytes(LENGTH, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_do_not_disturb_each_other(llama, ids, kind):
    engine = Engine.load(llama, plan=coded(llama, kind, 0.5))
    together = engine.new_cache(3, LENGTH)
    lengths = (5, 20, 33)
    for row, n in enumerate(lengths):
        engine.extend(together, ids[:n], row)
    next_tokens = torch.stack([ids[n] for n in lengths])
    found = engine.decode(together, next_tokens)
    for row, n in enumerate(lengths):
        alone = engine.new_cache(1, LENGTH)
        engine.extend(alone, ids[:n])
        torch.testing.assert_close(
            found[row], engine.decode(alone, ids[n : n + 1])[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
def test_bytes_are_those_of_the_plan(llama, kind, tokens):
    plan = coded(llama, kind, 0.4)
    cache = Engine.load(llama, plan=plan).new_cache(1, tokens)
    assert cache.allocated_bytes == plan.cache_bytes(tokens, 4)
    assert plan.bytes_per_token(4) == plan.cache_bytes(2, 4) - plan.cache_bytes(1, 4)


def test_a_snapshot_comes_back(llama, ids):
    engine = Engine.load(llama, plan=coded(llama, "unrotated", 0.5))
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, ids[:30])
    saved = cache.snapshot(0)
    first = engine.extend(cache, ids[30:40])
    cache.restore(0, saved)
    torch.testing.assert_close(engine.extend(cache, ids[30:40]), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_with_codes_is_read_as_written(llama, tmp_path, kind):
    plan = coded(llama, kind, 0.5)
    plan.write(tmp_path / "p.plan")
    again = Plan.read(tmp_path / "p.plan")
    assert again.layers == plan.layers
    assert again.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in plan.tensors.items())
    again.write(tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == (tmp_path / "p.plan").read_bytes()


def test_codes_without_their_tensors_are_refused(llama):
    plan = coded(llama, "rotated")
    name = "layers.1.keys.decode"
    with pytest.raises(PlanError, match=f"the tensor {name} of a code is missing"):
        replace(plan, tensors={k: v for k, v in plan.tensors.items() if k != name})
    with pytest.raises(PlanError, match="instead of"):
        replace(plan, tensors={**plan.tensors, name: plan.tensors[name][:1]})
    with pytest.raises(PlanError, match="not finite"):
        replace(plan, tensors={**plan.tensors, name: plan.tensors[name] * torch.nan})
    with pytest.raises(PlanError, match="cannot be composed"):
        plan.compose(plan)
    with pytest.raises(PlanError, match="keeps all of them"):
        LayerPlan((True, False), 1, 2, code=plan.layers[0].code)


# ---------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_at_full_width(llama, ids, method):
    plan = calibrate_projections(
        llama, ProjectionOptions(method, 0, 1, context=1000, tokens=1024), 10**12, 4
    )
    width = plan.base.kv_heads * plan.base.head_dim
    assert all(layer.code.width == 2 * width for layer in plan.layers)
    found = token_by_token(Engine.load(llama, plan=plan), ids)
    expected = token_by_token(Engine.load(llama), ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.7, 0.5, 0.2])
def test_a_budget_is_met_from_below(llama, method, share):
    options = ProjectionOptions(method, SINK, WINDOW, context=400, tokens=1024)
    native = Plan(base_of(llama), (LayerPlan((False, False)),) * base_of(llama).layers)
    budget = int(share * native.native_bytes(400, 2))
    plan = calibrate_projections(llama, options, budget, 2)
    step = 2 * 2 * 400 * plan.base.layers  # one number more of keys and of values
    assert budget - step < plan.cache_bytes(400, 2) <= budget


def test_a_budget_that_exact_tokens_eat_is_refused(llama):
    with pytest.raises(UsageError, match="is too small: the first 3 and last 7 tokens"):
        calibrate_projections(llama, ProjectionOptions("pca", SINK, WINDOW, context=11), 1000, 2)


def test_errors_are_the_tail_of_the_spectrum(llama):
    """PCA keeps the most variance per head, CSKV's optimum the most of the second moment."""
    statistics = collect(llama, StatisticsOptions(tokens=1024))
    for method in METHODS:
        plan = calibrate_projections(llama, ProjectionOptions(method, tokens=1024), 10**12, 4)
        for index in range(plan.base.layers):
            here = statistics.layer(index)
            width = plan.base.kv_heads * plan.base.head_dim
            keys = here.rotated_keys if method == "pca" else here.joint
            wanted = keys.covariance if method == "pca" else keys.second / keys.tokens
            wanted = wanted[:width, :width]
            parts = {n: plan.tensors[f"layers.{index}.keys.{n}"].double() for n in _PARTS}
            for rank in (2, width // 2, width - 1):
                lost = torch.eye(width) - parts["decode"][:, :rank] @ parts["encode"][:rank]
                error = (lost @ wanted @ lost.T).trace()
                torch.testing.assert_close(error, parts["spectrum"][rank:].sum(), rtol=1e-4, atol=0)


_PARTS = ("encode", "decode", "spectrum")


def test_pca_takes_turns_among_heads(llama):
    plan = calibrate_projections(llama, ProjectionOptions("pca", tokens=1024), 10**12, 4)
    heads, size = plan.base.kv_heads, plan.base.head_dim
    encode = plan.tensors["layers.0.values.encode"].view(-1, heads, size)
    reads = encode.abs().amax(-1) > 0  # [row, head]
    expected = torch.eye(heads, dtype=torch.bool).repeat(size, 1)
    assert torch.equal(reads, expected)


def test_what_a_code_cannot_be_is_refused(llama):
    plan = coded(llama, "rotated")
    width = plan.base.kv_heads * plan.base.head_dim
    wide = replace(plan.layers[0], code=CodePlan("rotated", width + 1, 1))
    with pytest.raises(PlanError, match=f"more than the {width} numbers"):
        replace(plan, layers=(wide,) * plan.base.layers)
    plain = LayerPlan((False,) * plan.base.kv_heads)
    with pytest.raises(PlanError, match="beside others"):
        replace(plan, layers=(plain, *plan.layers[1:]))
    huge = {name: tensor * 1e37 for name, tensor in plan.tensors.items()}
    with pytest.raises(PlanError, match="too large for this dtype"):
        Engine.load(llama, dtype=torch.float16, plan=replace(plan, tensors=huge))


def test_sinks_that_are_not_exact_are_in_the_statistics(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(
        projections, "collect", lambda _, options, **__: asked.append(options) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        calibrate_projections(llama, ProjectionOptions(sink=2), 10**9, 2)
    assert asked[0].sinks == 2


def test_damage_is_judged_behind_the_exact_tokens(llama):
    plan = coded(llama, "rotated", sink=10, window=190)
    assert prompt_length(plan, 192, 4096) == 400
