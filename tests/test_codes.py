"""Codes: exact at full width, the same however tokens arrive, and as many bytes as planned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import KINDS, SHAPES, SINK, WINDOW, coded, narrowed, token_by_token
from _convert_tools import YARN, one_thread, random_ids
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.codes import CodePlan
from kvtool.errors import PlanError
from kvtool.evaluate.layers import prompt_length
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan
from kvtool.runtime import Engine
from kvtool.slices import compose

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LENGTH = 48
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),  # biases
    "qwen3": ("qwen3", {}),  # a norm of each head
    "yarn": ("llama", {"rope_parameters": YARN}),  # a factor on cos and sin
}
shapes = pytest.mark.parametrize(("joint", "together"), SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(LENGTH)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Callable[[str], Checkpoint]:
    def get(name: str) -> Checkpoint:
        family, overrides = MODELS[name]
        return Checkpoint.open(str(tiny(family, **overrides)))

    return get


@pytest.fixture(scope="module")
def llama(model: Callable[[str], Checkpoint]) -> Checkpoint:
    return model("llama")


@pytest.fixture(scope="module")
def dense(model: Callable[[str], Checkpoint], ids: Tensor) -> Callable[[str], Tensor]:
    """Logits of the model that stores everything."""
    found: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in found:
            found[name] = token_by_token(Engine.load(model(name)), ids)
        return found[name]

    return get


@pytest.fixture(scope="module")
def lossy(llama: Checkpoint) -> Callable[..., Engine]:
    """``lossy(kind, joint, together, **ring)``: the model with half of each code."""
    found: dict[Any, Engine] = {}

    def get(kind: Any, joint: bool, together: int, **ring: int) -> Engine:
        key = (kind, joint, together, *ring.items())
        if key not in found:
            plan = coded(llama, kind, joint, together, 0.5, **ring)
            found[key] = Engine.load(llama, plan=plan)
        return found[key]

    return get


@contextmanager
def prefill(engine: Engine, how: Any) -> Iterator[Engine]:
    """The engine with another policy for prompts: it is no matter of its weights."""
    before = engine.plan
    assert before is not None
    engine.plan = replace(before, prefill=how)
    for attention in engine.attentions:
        attention.dense_prompt = how == "dense"
    yield engine
    engine.plan = before
    for attention in engine.attentions:
        attention.dense_prompt = before.prefill == "dense"


# --------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", MODELS)
@kinds
@shapes
def test_at_full_width_nothing_is_lost(model, dense, ids, name, kind, joint, together):
    engine = Engine.load(model(name), plan=coded(model(name), kind, joint, together))
    expected = dense(name)
    for how in ("dense", "streamed"):
        with prefill(engine, how):
            cache = engine.new_cache(1, LENGTH)
            parts = [engine.extend(cache, ids[:20], all_logits=True)]
            parts += [engine.extend(cache, ids[20:37], all_logits=True)]  # more than the window
            parts += [engine.decode(cache, token[None]) for token in ids[37:]]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-3, atol=1e-4)


@kinds
@shapes
@pytest.mark.parametrize("ring", [(0, 1), (SINK, WINDOW), (4, 60)])
def test_how_tokens_arrive_does_not_matter(lossy, ids, kind, joint, together, ring):
    with prefill(lossy(kind, joint, together, sink=ring[0], window=ring[1]), "streamed") as engine:
        expected = token_by_token(engine, ids)
        for pieces in ((LENGTH,), (1, 30, 17), (ring[0] + 3, 1, LENGTH - ring[0] - 4)):
            cache = engine.new_cache(1, 8)  # it grows on the way
            parts = [engine.extend(cache, piece, all_logits=True) for piece in ids.split(pieces)]
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@kinds
@shapes
def test_a_dense_prompt_is_read_exactly_and_coded_behind_its_end(
    lossy, dense, ids, kind, joint, together
):
    engine = lossy(kind, joint, together)
    exact = dense("llama")
    cache = engine.new_cache(1, LENGTH)
    found = engine.extend(cache, ids[:-12], all_logits=True, chunk=10)
    torch.testing.assert_close(found, exact[:-12], rtol=1e-4, atol=1e-4)
    behind = engine.extend(cache, ids[-12:], all_logits=True)
    assert (behind - exact[-12:]).abs().amax(-1).min() > 1e-3
    again = engine.new_cache(1, LENGTH)
    engine.extend(again, ids[:-12])
    steps = torch.cat([engine.decode(again, token[None]) for token in ids[-12:]])
    torch.testing.assert_close(behind, steps, rtol=1e-4, atol=1e-4)


@kinds
@shapes
def test_rows_of_different_lengths_do_not_disturb_each_other(lossy, ids, kind, joint, together):
    engine = lossy(kind, joint, together)
    cache = engine.new_cache(3, 8)
    lengths = (5, 20, 33)
    for row, n in enumerate(lengths):
        engine.extend(cache, ids[:n], row)
    found = [engine.decode(cache, torch.stack([ids[n + step] for n in lengths])) for step in (0, 1)]
    found += [engine.extend(cache, ids[22:34], 1)[None]]
    for row, n in enumerate(lengths):
        alone = engine.new_cache(1, LENGTH)
        engine.extend(alone, ids[:n])
        for step in (0, 1):
            expected = engine.decode(alone, ids[n + step : n + step + 1])[0]
            torch.testing.assert_close(found[step][row], expected, rtol=1e-4, atol=1e-4)
        if row == 1:
            expected = engine.extend(alone, ids[22:34])
            torch.testing.assert_close(found[2][0], expected, rtol=1e-4, atol=1e-4)


@kinds
@shapes
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_bytes_are_those_of_the_plan(lossy, kind, joint, together, tokens):
    engine = lossy(kind, joint, together)
    plan = engine.plan
    assert engine.new_cache(1, tokens).allocated_bytes == plan.cache_bytes(tokens, 4)
    assert engine.new_cache(2, tokens).allocated_bytes == 2 * plan.cache_bytes(tokens, 4)
    assert plan.bytes_per_token(4) == plan.cache_bytes(2, 4) - plan.cache_bytes(1, 4)
    exact = 2 * 2 * 16 * (SINK + WINDOW) * 3  # keys and values, heads, size; all layers
    assert plan.cache_bytes(1, 1) == exact + sum(sum(code.widths) for code in plan.codes)


def test_a_prompt_that_was_read_densely_leaves_nothing_behind(lossy, ids):
    engine = lossy("rotated", True, 2)
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, ids, chunk=10)
    assert cache.allocated_bytes == engine.plan.cache_bytes(LENGTH, 4)


# ----------------------------------------------------------------------------- back and forth


@kinds
@shapes
def test_a_snapshot_comes_back(lossy, ids, kind, joint, together):
    engine = lossy(kind, joint, together)
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, ids[:30])
    saved = cache.snapshot(0)
    first = engine.extend(cache, ids[30:40], all_logits=True)
    engine.decode(cache, ids[:1])
    cache.restore(0, saved)
    torch.testing.assert_close(engine.extend(cache, ids[30:40], all_logits=True), first)


@shapes
def test_a_row_goes_back_as_long_as_its_ring_has_lost_nothing(lossy, ids, joint, together):
    engine = lossy("unrotated", joint, together, sink=2, window=20)
    with prefill(engine, "streamed"):
        cache = engine.new_cache(1, LENGTH)
        expected = engine.extend(cache, ids[:22], all_logits=True)
        cache.crop(0, 9)
        assert cache.lengths == [9]
        found = engine.extend(cache, ids[9:22], all_logits=True)
        torch.testing.assert_close(found, expected[9:], rtol=1e-4, atol=1e-4)
        engine.decode(cache, ids[22:23])
        cache.crop(0, 22)
        assert cache.lengths == [0]
        again = engine.extend(cache, ids[:22], all_logits=True)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@contextmanager
def interrupted(engine: Engine, layer: int) -> Iterator[None]:
    """The layer's attention is as far as it gets; what comes next is another call."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = engine.attentions[layer].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        yield
    handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
@kinds
@shapes
def test_an_interrupted_call_leaves_no_trace(lossy, ids, kind, joint, together, layer):
    engine = lossy(kind, joint, together)
    expected = token_by_token(engine, ids, prompt=20)
    cache = engine.new_cache(1, LENGTH)
    with interrupted(engine, layer):
        engine.extend(cache, ids[5:25])
    assert cache.lengths == [0]
    engine.extend(cache, ids[:20])
    with interrupted(engine, layer):
        engine.decode(cache, ids[:1])
    assert cache.lengths == [20]
    found = [engine.decode(cache, token[None])[0] for token in ids[20:30]]
    torch.testing.assert_close(torch.stack(found), expected[20:30], rtol=1e-4, atol=1e-4)
    saved = cache.snapshot(0)
    with interrupted(engine, layer):
        engine.extend(cache, ids[30:40])
    cache.restore(0, saved)
    last = engine.extend(cache, ids[30:], all_logits=True)
    torch.testing.assert_close(last, expected[30:], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- the plan


def test_codes_without_their_tensors_are_refused(llama):
    plan = coded(llama, together=2)
    name = "codes.1.keys.decode"
    for names, complaint in (
        ([name], f"the tensor {name} of a code is missing"),
        (["codes.0.values.spectrum"], "the tensor codes.0.values.spectrum of a code is missing"),
    ):
        with pytest.raises(PlanError, match=complaint):
            replace(plan, tensors={k: v for k, v in plan.tensors.items() if k not in names})
    tensor = plan.tensors[name]
    for wrong, complaint in (
        (tensor[:1], "instead of"),
        (tensor.double(), "float64"),
        (tensor * torch.nan, "not finite"),
    ):
        with pytest.raises(PlanError, match=complaint):
            replace(plan, tensors={**plan.tensors, name: wrong})
    with pytest.raises(PlanError, match=r"a tensor that no plan has: codes\.2"):
        replace(plan, tensors={**plan.tensors, "codes.2.keys.mean": tensor})
    with pytest.raises(PlanError, match="cannot be composed"):
        compose(plan, plan)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (("rotated", 0, (1, 1)), "for 0 layers is none"),
        (("rotated", 1, ()), "no numbers"),
        (("rotated", 1, (1, 0)), r"1 \+ 0 numbers"),
        (("rotated", 1, (1, 1, 1)), r"1 \+ 1 \+ 1 numbers"),
        (("rotated", 1, (1,), -1), "-1 exact sinks"),
        (("rotated", 1, (1,), 0, 0), "the current token"),
    ],
)
def test_a_code_that_is_none_cannot_be_made(code, complaint):
    with pytest.raises(PlanError, match=complaint):
        CodePlan(*code)


def test_what_a_code_cannot_be_is_refused(llama):
    plan = coded(llama, together=2)
    wide = replace(plan.codes[0], widths=(2 * plan.base.channels + 1, 1))
    with pytest.raises(PlanError, match="stores 65 numbers of 64, and has 64 to choose"):
        replace(plan, codes=(wide, plan.codes[1]))
    few = {k: v[:5] if "keys.spectrum" in k else v for k, v in plan.tensors.items()}
    with pytest.raises(PlanError, match="stores 64 numbers of 64, and has 5 to choose"):
        replace(plan, tensors=few)
    for codes, complaint in (
        (plan.codes[:1], "codes cover 2 layers, of a model with 3"),
        ((*plan.codes, plan.codes[1]), "codes cover 4 layers"),
        ((), "come together"),
    ):
        with pytest.raises(PlanError, match=complaint):
            replace(plan, codes=codes)
    with pytest.raises(PlanError, match="come together"):
        replace(plan, allocation=None)
    streams = LayerPlan((True, False), 1, 2)
    for change in ({"layers": (streams, *plan.layers[1:])}, {"scores": torch.zeros(3, 2)}):
        with pytest.raises(PlanError, match="keeps all of them in all heads"):
            replace(plan, **change)
    huge = {name: tensor * 1e37 for name, tensor in plan.tensors.items()}
    with pytest.raises(PlanError, match="code 0: its keys are too large for this dtype"):
        Engine.load(llama, dtype=torch.float16, plan=replace(plan, tensors=huge))


@kinds
@shapes
def test_a_plan_with_codes_is_read_as_written(llama, tmp_path, kind, joint, together):
    plan = narrowed(coded(llama, kind, joint, together), 0.5)
    plan.write(tmp_path / "p.plan")
    again = Plan.read(tmp_path / "p.plan")
    assert (again.layers, again.codes) == (plan.layers, plan.codes)
    assert again.allocation == plan.allocation
    assert again.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in plan.tensors.items())
    again.write(tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == (tmp_path / "p.plan").read_bytes()


def test_a_plan_may_keep_fewer_rows_than_a_code_has(llama, ids, tmp_path):
    """Rows that no budget will take need not be in the file."""
    whole = narrowed(coded(llama, "unrotated", True, 2), 0.4)
    tensors = dict(whole.tensors)
    for index, code in enumerate(whole.codes):
        name, kept = f"codes.{index}.joint", code.width + 3
        for part in ("encode", "spectrum"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:kept]
        tensors[f"{name}.decode"] = tensors[f"{name}.decode"][:, :kept]
    replace(whole, tensors=tensors).write(tmp_path / "p.plan")
    found, expected = (
        token_by_token(Engine.load(llama, plan=plan), ids[:20])
        for plan in (Plan.read(tmp_path / "p.plan"), whole)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # strides differ, and sums


def test_damage_is_judged_behind_the_exact_tokens(llama):
    plan = coded(llama, "rotated", sink=10, window=190)
    assert prompt_length(plan, 192, 4096) == 400
