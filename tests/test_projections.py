"""Methods that plan codes: optimal in what they claim, exact at full width, and sliced at will."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import KINDS, SHAPES, SINK, WINDOW, coded, narrowed, token_by_token
from _convert_tools import YARN, one_thread, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvtool.calibrate import asvd, aware, cskv, projections
from kvtool.calibrate.felt import Felt
from kvtool.calibrate.past import measure, read_again, read_past, through
from kvtool.calibrate.projections import METHODS, ProjectionOptions, calibrate_projections
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.codes import STEP, Projection
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.slices import cut

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

VARIANTS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"method": "aware", "read": "rebuilt"},
    {"method": "aware", "together": 2},
    {"method": "aware", "read": "rebuilt", "together": 3},
    {"method": "xkv", "together": 2},
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda x: "-".join(str(value) for value in x.values())
)
CONTEXT = 400


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny("llama", num_key_value_heads=2)))


@pytest.fixture(scope="module")
def fitted(llama: Checkpoint) -> Callable[..., Plan]:
    """``fitted(share, **options)``: a plan for a share of the native cache."""
    found: dict[Any, Plan] = {}

    def get(share: float, **options: Any) -> Plan:
        key = (share, *options.items())
        if key not in found:
            asked = {"sink": SINK, "window": WINDOW, "context": CONTEXT, "tokens": 1024} | options
            found[key] = calibrate_projections(
                llama, ProjectionOptions(**asked), budget(llama, share), 2
            )
        return found[key]

    return get


def budget(checkpoint: Checkpoint, share: float) -> int:
    native = Plan(base_of(checkpoint), whole_layers(checkpoint)).native_bytes(CONTEXT, 2)
    return int(share * native)


# ------------------------------------------------------------------------------- every method


@variants
def test_every_method_is_exact_at_full_width(llama, fitted, variant):
    plan = fitted(100, **variant)
    assert sum(code.width for code in plan.codes) == 2 * plan.base.channels * plan.base.layers
    ids = random_ids(32)
    found = token_by_token(Engine.load(llama, plan=plan), ids, prompt=5)
    expected = token_by_token(Engine.load(llama), ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@variants
def test_a_slice_is_what_calibration_gives_at_that_budget(llama, fitted, variant):
    whole = fitted(100, **variant)
    for share in (0.7, 0.3):
        smaller = cut(whole, budget(llama, share), CONTEXT, 2)
        alone = fitted(share, **variant)
        assert smaller.codes == alone.codes
        assert smaller.allocation == alone.allocation
        assert smaller.tensors.keys() == alone.tensors.keys()
        for name, tensor in smaller.tensors.items():
            assert torch.equal(tensor, alone.tensors[name]), name


@variants
def test_a_budget_is_met_from_below(llama, fitted, variant):
    for share in (0.7, 0.3):
        plan, allowed = fitted(share, **variant), budget(llama, share)
        # One number more of each part and layer, or eight more of one part.
        step = 2 * CONTEXT * max(2 * plan.base.layers, STEP)
        assert allowed - step < plan.cache_bytes(CONTEXT, 2) <= allowed


@variants
def test_a_spectrum_that_a_budget_goes_by_falls(fitted, variant):
    plan = fitted(100, **variant)
    for name, tensor in plan.tensors.items():
        if name.endswith("spectrum"):
            assert plan.allocation == "even" or (tensor.diff() <= 0).all()
            assert (tensor >= 0).all()


def test_codes_are_of_the_layers_that_were_asked_for(fitted):
    for variant, layers, kind, parts in (
        ({"method": "aware"}, [1, 1, 1], "rotated", ("keys", "values")),
        ({"method": "aware", "together": 2}, [2, 1], "rotated", ("keys", "values")),
        ({"method": "aware", "read": "rebuilt", "together": 3}, [3], "unrotated", ("joint",)),
        ({"method": "xkv", "together": 2}, [2, 1], "unrotated", ("keys", "values")),
        ({"method": "pca"}, [1, 1, 1], "rotated", ("keys", "values")),
        ({"method": "palu"}, [1, 1, 1], "unrotated", ("keys", "values")),
    ):
        codes = fitted(0.3, **variant).codes
        assert [code.layers for code in codes] == layers
        assert {(code.kind, code.parts) for code in codes} == {(kind, parts)}
        assert {(code.sink, code.window) for code in codes} == {(SINK, WINDOW)}


def test_a_budget_that_exact_tokens_eat_is_refused(llama):
    for method in METHODS:
        options = ProjectionOptions(method, sink=SINK, window=WINDOW, context=11)
        with pytest.raises(UsageError, match="is too small: the first 3 and last 7 tokens"):
            calibrate_projections(llama, options, 1000, 2)


def test_a_text_shorter_than_a_window_is_refused(llama):
    for method in METHODS:
        with pytest.raises(UsageError, match="tokens"):
            calibrate_projections(llama, ProjectionOptions(method, tokens=100), 10**9, 2)


def test_sinks_that_are_not_exact_are_in_the_statistics(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(
        projections, "collect", lambda _, options, **__: asked.append(options) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        calibrate_projections(llama, ProjectionOptions("cskv", sink=2, tokens=1024), 10**9, 2)
    assert asked[0].sinks == 2


# ----------------------------------------------------------------- principal directions, ASVD


@pytest.mark.parametrize("method", ["pca", "cskv"])
def test_errors_are_the_tail_of_the_spectrum(llama, fitted, method):
    """PCA keeps the most variance per head, CSKV's optimum the most of the second moment."""
    statistics = collect(llama, StatisticsOptions(tokens=1024, sinks=SINK))
    plan = fitted(100, method=method)
    width = plan.base.channels
    for index in range(plan.base.layers):
        here = statistics.layer(index)
        keys = here.rotated_keys if method == "pca" else here.joint
        wanted = keys.covariance if method == "pca" else keys.second / keys.tokens
        wanted = wanted[:width, :width]
        encode, decode, spectrum = (
            plan.tensors[f"codes.{index}.keys.{name}"].double()
            for name in ("encode", "decode", "spectrum")
        )
        for rank in (2, width // 2, width - 1):
            lost = torch.eye(width) - decode[:, :rank] @ encode[:rank]
            error = (lost @ wanted @ lost.T).trace()
            torch.testing.assert_close(error, spectrum[rank:].sum(), rtol=1e-4, atol=0)


def test_pca_takes_turns_among_heads(fitted):
    plan = fitted(100, method="pca")
    heads, size = plan.base.kv_heads, plan.base.head_dim
    encode = plan.tensors["codes.0.values.encode"].view(-1, heads, size)
    reads = encode.abs().amax(-1) > 0  # [row, head]
    assert torch.equal(reads, torch.eye(heads, dtype=torch.bool).repeat(size, 1))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_asvd_is_the_decomposition_of_the_scaled_projections(tiny, family):
    windows = torch.stack([random_ids(60, seed=seed) for seed in (0, 1)])
    found = asvd.fit(LayerStream(Checkpoint.open(str(tiny(family)))), windows)
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):

        def keep(_: Any, given: tuple[Tensor], index: int = index) -> None:
            inputs[index] = given[0]

        layer.self_attn.k_proj.register_forward_pre_hook(keep)
    model(windows)
    for index, layer in enumerate(model.model.layers):
        scale = inputs[index].abs().double().mean(dim=(0, 1)) ** 0.5
        for part, linear in (
            ("keys", layer.self_attn.k_proj),
            ("values", layer.self_attn.v_proj),
        ):
            left, sizes, _ = torch.linalg.svd(linear.weight.double() * scale, full_matrices=False)
            fitted = found[index][part]
            cosines = (fitted.projection.encode * left.T).sum(-1).abs()
            torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)
            assert torch.equal(fitted.projection.decode, fitted.projection.encode.T)
            torch.testing.assert_close(fitted.spectrum, sizes**2, rtol=1e-4, atol=0)
            bias = linear.bias if linear.bias is not None else torch.zeros(len(linear.weight))
            assert torch.equal(fitted.projection.mean, bias.double())


def test_asvd_refuses_normed_keys_before_it_reads_a_weight(tiny, monkeypatch):
    stream = LayerStream(Checkpoint.open(str(tiny("qwen3"))))
    monkeypatch.setattr(stream, "embed", None)
    with pytest.raises(UnsupportedModelError, match="norms its keys"):
        asvd.fit(stream, random_ids(60)[None])


# -------------------------------------------------------------------------------------- aware


def a_felt(seed: int, size: int = 24, rank: int | None = None) -> Felt:
    """Random sums; of a `rank` below `size`, the predictions feel only some directions."""
    generator = torch.Generator().manual_seed(seed)

    def gram(count: int) -> Tensor:
        spread = torch.logspace(0, -2, size, dtype=torch.float64)
        x = torch.randn(count, size, generator=generator, dtype=torch.float64) * spread
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return (x @ turn).T @ (x @ turn)

    return Felt(50, 400, gram(400), gram(rank or 400), 80.0, 80 * gram(400))


@pytest.mark.parametrize("seed", range(4))
def test_what_aware_loses_is_the_tail_of_its_spectrum_and_the_least_possible(seed):
    """min over M of rank r of ½ tr F (I - M) C (I - M)ᵀ, at an oblique projector."""
    felt = a_felt(seed)
    fitted = aware.fit(felt, ("joint",))["joint"]
    metric, tokens = felt.metric / felt.predictions, felt.weighted / felt.weight
    size, generator = len(metric), torch.Generator().manual_seed(seed)

    def lost(matrix: Tensor) -> float:
        error = torch.eye(size) - matrix
        return float((metric @ error @ tokens @ error.T).trace() / 2)

    encode, decode = fitted.projection.encode, fitted.projection.decode
    torch.testing.assert_close(encode @ decode, torch.eye(size).double(), rtol=0, atol=1e-8)
    rivals = [
        cskv.principal(felt.second / felt.tokens).projection,
        cskv.principal(tokens).projection,
        cskv.principal(metric).projection,
    ]
    for rank in (1, 5, 12, size - 1):
        ours = decode[:, :rank] @ encode[:rank]
        torch.testing.assert_close(ours @ ours, ours, rtol=0, atol=1e-8)
        assert torch.linalg.matrix_rank(ours) == rank
        assert lost(ours) == pytest.approx(float(fitted.spectrum[rank:].sum()), rel=1e-8)
        others = [x.decode[:, :rank] @ x.encode[:rank] for x in rivals]
        others += [
            torch.randn(size, rank, generator=generator, dtype=torch.float64)
            @ torch.randn(rank, size, generator=generator, dtype=torch.float64)
            for _ in range(3)
        ]
        for scale in (1e-1, 1e-3):  # its neighbours
            noise = [
                scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                for x in (decode[:, :rank], encode[:rank])
            ]
            others.append((decode[:, :rank] + noise[0]) @ (encode[:rank] + noise[1]))
        assert all(lost(other) >= lost(ours) * (1 - 1e-9) for other in others)


def test_directions_that_nothing_feels_are_kept_last():
    felt = a_felt(0, rank=10)
    fitted = aware.fit(felt, ("joint",))["joint"]
    spectrum = fitted.spectrum
    assert spectrum[10:].sum() < 1e-4 * spectrum[:10].sum()
    both = fitted.projection.decode @ fitted.projection.encode
    torch.testing.assert_close(both, torch.eye(24).double(), rtol=0, atol=1e-6)
    nothing = replace(
        felt, metric=torch.zeros_like(felt.metric), weighted=felt.metric * 0, weight=0
    )
    empty = aware.fit(nothing, ("joint",))["joint"]
    assert not empty.spectrum.any()
    assert all(x.isfinite().all() for x in vars(empty.projection).values())


def test_codes_that_are_judged_to_cost_more_get_more_rows(fitted):
    plan = fitted(0.3, method="aware")
    (made,) = plan.provenance
    count = len(plan.codes)
    assert [len(made[name]) for name in ("predicted", "measured", "widths")] == [count] * 3
    assert made["measured_together"] > 0
    # The spectra are in the nats that were measured: their tails at those widths sum up to them.
    for index, (widths, nats) in enumerate(zip(made["widths"], made["measured"], strict=True)):
        tails = [
            float(plan.tensors[f"codes.{index}.{part}.spectrum"].double()[width:].sum())
            for part, width in zip(plan.codes[index].parts, widths, strict=True)
        ]
        assert sum(tails) == pytest.approx(nats, rel=1e-3)


def test_keys_and_values_apart_are_blocks_of_the_whole():
    felt = a_felt(1)
    half = len(felt.metric) // 2
    apart = aware.fit(felt, ("keys", "values"))
    for part, own in (("keys", slice(0, half)), ("values", slice(half, None))):
        alone = replace(felt, metric=felt.metric[own, own], weighted=felt.weighted[own, own])
        whole = aware.fit(alone, ("joint",))["joint"]
        torch.testing.assert_close(apart[part].spectrum, whole.spectrum)


# --------------------------------------------------------- what is judged is what will be run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("joint", "together"), SHAPES)
@pytest.mark.parametrize("rope", [None, YARN])
def test_codes_are_judged_as_the_runtime_reads_them(tiny, kind, joint, together, rope):
    overrides = {} if rope is None else {"rope_parameters": rope}
    checkpoint = Checkpoint.open(str(tiny("llama", **overrides)))
    plan = narrowed(coded(checkpoint, kind, joint, together), 0.5)
    ids, prompt = random_ids(40), 40 - WINDOW
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, len(ids))
    engine.extend(cache, ids[:prompt])
    found = engine.extend(cache, ids[prompt:], all_logits=True).log_softmax(-1)
    model = TailModel(LayerStream(checkpoint))
    past = read_past(model, ids, WINDOW)
    codes = [
        (
            code,
            {
                part: Projection(
                    *(plan.tensors[f"codes.{i}.{part}.{n}"] for n in ("encode", "decode", "mean"))
                )
                for part in code.parts
            },
        )
        for i, code in enumerate(plan.codes)
    ]
    again = read_again(model, past, through(model, past, codes))
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)
    exact = Engine.load(checkpoint)
    true = exact.extend(exact.new_cache(1, 40), ids, all_logits=True)[prompt:].log_softmax(-1)
    torch.testing.assert_close(past.expected, true, rtol=1e-4, atol=1e-4)
    kl = float((true.exp() * (true - found)).sum(-1).mean())
    assert measure(model, [past], codes) == pytest.approx(kl, rel=1e-3)
    # Where a window begins changes nothing: RoPE knows distances only.
    shifted = read_past(model, ids, WINDOW, offset=37)
    if kind == "unrotated":
        assert measure(model, [shifted], codes) == pytest.approx(kl, rel=1e-2)


def test_a_code_alone_is_measured_with_all_others_exact(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    plan = coded(checkpoint, "rotated", True)
    model, ids = TailModel(LayerStream(checkpoint)), random_ids(40)
    past = read_past(model, ids, WINDOW)
    narrow = narrowed(plan, 0.4).codes[1]

    def projection(i: int) -> dict[Any, Projection]:
        names = (f"codes.{i}.joint.{n}" for n in ("encode", "decode", "mean"))
        return {"joint": Projection(*(plan.tensors[n] for n in names))}

    codes = [(plan.codes[0], projection(0)), (narrow, projection(1)), (narrow, projection(2))]
    first, second, third = (measure(model, [past], codes, only) for only in range(3))
    assert abs(first) < 1e-6  # it is at full width
    assert second > 1e-3
    assert third > 1e-3
    wide = [(plan.codes[0], projection(0)), (narrow, projection(1)), (plan.codes[2], projection(2))]
    assert measure(model, [past], wide) == pytest.approx(second, rel=1e-3)
