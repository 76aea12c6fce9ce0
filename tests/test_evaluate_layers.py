"""Damage by layer: it is that of a model with this layer, and of no other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import KINDS, coded
from _convert_tools import convert, edited_copy, one_thread
from _hybrid_tools import MULTIPLIERS, write_hybrid
from test_packed_latents import planned as packed_latents
from torch import Tensor

from kvtool import attention, latent
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.evaluate import protocol
from kvtool.evaluate.layers import Damage, comparable, layer_damage, prompt_length, separable
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, Policy, Prefill, base_of
from kvtool.runtime import Engine, stores

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

PREFILL, CONTINUATION = 96, 40
FULL, STREAMS = (False, False), (False, True)


def load(folder: Path, plan: Plan | None = None) -> Engine:
    return Engine.load(Checkpoint.open(str(folder)), plan=plan)


def window(engine: Engine) -> Tensor:
    """`[P + C + 1]`: the last token is only a target."""
    (ids,) = evaluation_text().windows(engine.tokenizer, PREFILL + CONTINUATION + 1, 1)
    return ids


def damage(engine: Engine, base: Engine) -> list[Damage]:
    return list(layer_damage(engine, base, window(base)[:-1], PREFILL))


def whole_kl(engine: Engine, base: Engine) -> float | None:
    """KL of the whole model on the same text, by the protocol."""
    (score,) = protocol.score_windows(engine, base, window(base)[None], PREFILL)
    return score.kl


def a_plan(
    folder: Path,
    layers: tuple[LayerPlan, ...],
    prefill: Prefill = "dense",
    policy: Policy | None = None,
) -> Plan:
    return Plan(base_of(Checkpoint.open(str(folder))), layers, prefill, policy)


def add_noise(tensors: dict[str, Tensor], name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj", "input_layernorm"])
def test_a_damaged_layer_alone_is_to_blame(
    tiny: Callable[..., Path], tmp_path: Path, part: str
) -> None:
    base = load(tiny("llama"))
    name = f"model.layers.1.{part}.weight"
    wrong = edited_copy(tiny("llama"), tmp_path / "wrong", lambda t: add_noise(t, name))
    engine = load(wrong)
    first, second, third = damage(engine, base)
    assert first == third == Damage(0.0, 0.0, None)
    assert second.kl == pytest.approx(whole_kl(engine, base), rel=1e-4)
    assert second.kl > 1e-4
    assert (second.output_error > 1e-3) == (part != "mlp.up_proj")


def test_multipliers_of_granite_are_applied(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_hybrid(tiny("llama"), tmp_path / "granite", [], **MULTIPLIERS)
    name = "model.layers.1.self_attn.k_proj.weight"
    wrong = edited_copy(tmp_path / "granite", tmp_path / "wrong", lambda t: add_noise(t, name))
    engine, base = load(wrong), load(tmp_path / "granite")
    assert damage(engine, base)[1].kl == pytest.approx(whole_kl(engine, base), rel=1e-4)


def test_each_layer_gets_what_the_original_gives_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    first, last = (f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 2))

    def both(tensors: dict[str, Tensor]) -> None:
        add_noise(tensors, first)
        add_noise(tensors, last)

    base = load(tiny("llama"))
    engine = load(edited_copy(tiny("llama"), tmp_path / "both", both))
    alone = load(edited_copy(tiny("llama"), tmp_path / "last", lambda t: add_noise(t, last)))
    found, expected = damage(engine, base), damage(alone, base)
    assert found[0].kl > 1e-4
    assert found[2] == expected[2]


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_of_a_plan_only_layers_that_drop_tokens_do_damage(
    tiny: Callable[..., Path], prefill: Prefill
) -> None:
    layers = (LayerPlan(FULL), LayerPlan(STREAMS, sink=2, window=8), LayerPlan(FULL))
    engine = load(tiny("qwen3"), a_plan(tiny("qwen3"), layers, prefill))
    base = load(tiny("qwen3"))
    first, drops, last = damage(engine, base)
    assert first == last == Damage(0.0, 0.0, None)
    assert drops.score_error is None
    assert drops.output_error > 1e-2
    assert drops.kl == pytest.approx(whole_kl(engine, base), rel=1e-4)


def test_a_layer_with_token_budgets_is_judged_by_what_it_kept(tiny: Callable[..., Path]) -> None:
    kept = LayerPlan(FULL, budget=(8, None))
    plan = a_plan(tiny("llama"), (LayerPlan(FULL), kept, LayerPlan(FULL)), policy="snapkv")
    engine, base = load(tiny("llama"), plan), load(tiny("llama"))
    first, second, third = damage(engine, base)
    assert first == third == Damage(0.0, 0.0, None)
    assert second.kl == pytest.approx(whole_kl(engine, base), rel=1e-4)
    assert second.kl > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True])
def test_a_layer_whose_code_is_narrow_alone_is_to_blame(
    tiny: Callable[..., Path], kind: Any, joint: bool
) -> None:
    plan = coded(Checkpoint.open(str(tiny("llama"))), kind, joint)
    narrow = replace(plan.codes[1], widths=tuple(n // 2 for n in plan.codes[1].widths))
    plan = replace(plan, codes=(plan.codes[0], narrow, plan.codes[2]))
    engine, base = load(tiny("llama"), plan), load(tiny("llama"))
    assert separable(engine)
    first, second, third = damage(engine, base)
    for exact in (first, third):
        assert abs(exact.kl) < 1e-6
        assert exact.output_error < 1e-4
    assert second.kl == pytest.approx(whole_kl(engine, base), rel=1e-3)
    assert second.kl > 1e-3


def test_layers_that_share_a_code_cannot_be_taken_apart(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    assert not separable(load(tiny("llama"), coded(checkpoint, together=2)))
    assert separable(load(tiny("llama")))


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_exact_conversion_does_no_damage(
    tiny: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    convert(tiny(family), tmp_path / "mla", method="exact", target=target)
    found = damage(load(tmp_path / "mla"), load(tiny(family)))
    assert len(found) == 3
    for layer in found:
        assert abs(layer.kl) < 1e-8
        assert layer.output_error < 1e-4
        assert layer.score_error is not None
        assert layer.score_error < 1e-4


@pytest.fixture(scope="module")
def lossy(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossy") / "mla"
    convert(tiny("llama"), folder, kv_budget="50%", target="kvtool")
    return folder


def test_score_errors_are_those_of_the_scores_that_the_layers_attend_with(
    tiny: Callable[..., Path], lossy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    plain = attention.causal_attention

    def watched(
        q: Tensor, k: Tensor, v: Tensor, scaling: float, *window: Any, **more: Any
    ) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        seen.append(scaling * torch.matmul(q[0].double(), keys[0].double().mT))
        return plain(q, k, v, scaling, *window, **more)

    monkeypatch.setattr(attention, "causal_attention", watched)
    monkeypatch.setattr(latent, "causal_attention", watched)
    monkeypatch.setattr(stores, "causal_attention", watched)
    engine, base = load(lossy), load(tiny("llama"))
    first = next(iter(layer_damage(engine, base, window(base)[:-1], PREFILL)))
    # Prompt and rest: all three layers of the original, its first one again, and the other first.
    own, other = seen[7], seen[9]
    wrong = right = 0.0
    for head in range(own.shape[0]):
        for row in range(CONTINUATION):
            keys = PREFILL + row + 1
            s, t = own[head, row, :keys], other[head, row, :keys]
            s, t = s - s.mean(), t - t.mean()
            wrong += float(((s - t) ** 2).sum())
            right += float((s**2).sum())
    assert first.score_error == pytest.approx((wrong / right) ** 0.5, rel=1e-4)
    assert first.score_error > 1e-2


def test_packed_latents_do_damage_of_which_the_scores_are_not_told(lossy: Path) -> None:
    packed = packed_latents(Checkpoint.open(str(lossy)), group=16, sink=1, window=4)
    found = damage(load(lossy, packed), load(lossy))
    assert all(layer.kl > 1e-5 and layer.score_error is None for layer in found)


@pytest.mark.parametrize("heads", [{"num_attention_heads": 8, "head_dim": 8}, {"head_dim": 8}])
def test_scores_are_compared_only_with_those_of_as_many_query_heads(
    tiny: Callable[..., Path], lossy: Path, heads: dict[str, int]
) -> None:
    found = damage(load(lossy), load(tiny("llama", **heads)))
    assert all(layer.kl > 1e-3 and layer.output_error > 1e-2 for layer in found)
    assert [layer.score_error is None for layer in found] == [len(heads) == 2] * 3


def test_a_layer_that_gives_nothing_has_no_error(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def prune(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()

    pruned = load(edited_copy(tiny("llama"), tmp_path / "pruned", prune))
    assert damage(pruned, pruned) == [Damage(0.0, 0.0, None)] * 3


def test_layers_of_other_shapes_are_not_comparable(tiny: Callable[..., Path]) -> None:
    base = load(tiny("llama"))
    assert comparable(base, load(tiny("qwen3")))
    assert not comparable(base, load(tiny("llama", num_hidden_layers=2)))
    assert not comparable(base, load(tiny("llama", hidden_size=32)))


@pytest.mark.parametrize(
    ("layer", "least", "most", "expected"),
    [
        (None, 384, 1536, 384),
        (None, 384, 100, 100),
        (LayerPlan(STREAMS, sink=16, window=256), 256, 1536, 544),
        (LayerPlan(FULL, budget=(300, None)), 384, 1536, 600),
        (LayerPlan(STREAMS, sink=4, window=8), 384, 1536, 384),
        (LayerPlan(STREAMS, sink=16, window=256), 384, 400, 400),
    ],
)
def test_a_prompt_is_long_enough_for_a_plan_to_drop_half_of_it(
    tiny: Callable[..., Path], layer: LayerPlan | None, least: int, most: int, expected: int
) -> None:
    plan = None
    if layer is not None:
        policy: Policy | None = None if layer.budget is None else "snapkv"
        plan = a_plan(tiny("llama"), (layer, LayerPlan(FULL), LayerPlan(FULL)), policy=policy)
    assert prompt_length(plan, least, most) == expected
