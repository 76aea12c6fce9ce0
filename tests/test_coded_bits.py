"""Codes of few bits: bytes as planned, the same however tokens arrive, better for being tuned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import one_thread, random_ids
from _packed import logits
from torch import Tensor

from kvtool.calibrate import cskv
from kvtool.calibrate.levelled import levelled
from kvtool.calibrate.past import measure, read_past
from kvtool.calibrate.projections import (
    JUDGED,
    ProjectionOptions,
    calibrate_projections,
    empty_codes,
)
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.calibrate.tuned import tokens_of, tune
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.codes import (
    CodeKind,
    CodePlan,
    Fitted,
    Projection,
    code_shapes,
    share_budget,
)
from kvtool.corpus import calibration_text
from kvtool.errors import PlanError, UsageError
from kvtool.evaluate.protocol import cache_size
from kvtool.kernels.quantise import fake_quantise
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.slices import cut

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

SINK, WINDOW = 3, 7
LENGTH = 48
KINDS: tuple[CodeKind, ...] = ("rotated", "unrotated")
BITS = (2, 4, 8)
SMALL = ProjectionOptions(sink=SINK, window=WINDOW, context=400, tokens=1024)


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny("llama")))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(LENGTH)


def coded(
    checkpoint: Checkpoint,
    kind: CodeKind,
    bits: int | None,
    share: float = 1.0,
    layers: int = 1,
    parts: int = 2,
    **more: Any,
) -> Plan:
    """A plan with random invertible codes, whose means are not zero."""
    base = base_of(checkpoint)
    generator = torch.Generator().manual_seed(0)
    codes, tensors = [], {}
    start = Plan(base, whole_layers(checkpoint))
    for index in range(len(start.planned_layers) // layers):
        full = layers * base.channels * 2 // parts
        own = {"sink": SINK, "window": WINDOW, "bits": bits, **more}
        codes.append(CodePlan(kind, layers, (max(1, int(share * full)),) * parts, **own))
        for name, shape in code_shapes(index, codes[-1], base.channels, (full,) * parts).items():
            tensors[name] = torch.randn(*shape, generator=generator)
            if name.endswith("encode"):
                near = torch.eye(full) + 0.3 * tensors[name] / full**0.5
                tensors[name] = near
                inverse = torch.linalg.inv(near.double()).float()
            elif name.endswith("decode"):
                tensors[name] = inverse
    return replace(start, codes=tuple(codes), allocation="even", tensors=tensors)


def divergence(expected: Tensor, found: Tensor) -> float:
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---------------------------------------------------------------------------------------- runtime


@pytest.mark.parametrize(("kind", "parts"), [("rotated", 1), ("unrotated", 2)])
def test_more_bits_are_closer_to_the_original(llama, ids, kind, parts):
    expected = logits(Engine.load(llama), ids, 1)
    lost = [
        divergence(
            expected,
            logits(Engine.load(llama, plan=coded(llama, kind, bits, parts=parts)), ids, 1),
        )
        for bits in (2, 4, 8, None)
    ]
    assert lost[0] > 10 * lost[1] > 100 * lost[2] > 0
    assert lost[2] < 2e-3
    assert lost[3] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layers", [1, 3])
def test_how_tokens_arrive_does_not_matter(llama, ids, kind, bits, layers):
    plan = replace(coded(llama, kind, bits, 0.5, layers), prefill="streamed")
    # A sum in another order may round to the other side of a step, hardly ever in float64.
    engine = Engine.load(llama, plan=plan, dtype=torch.float64)
    expected = logits(engine, ids, 1)
    for pieces in ((LENGTH,), (1, 30, 17)):
        cache = engine.new_cache(1, 8)  # grows
        parts = [engine.extend(cache, piece, all_logits=True) for piece in ids.split(pieces)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_layers_read_what_the_codec_gives_back(llama, ids, kind, prefill):
    """The store with bits is the store without them, fed what the integers are read as."""
    plan = replace(coded(llama, kind, 4, 0.5), prefill=prefill)
    packed = Engine.load(llama, plan=plan)
    found = logits(packed, ids, 20)
    plain = Engine.load(
        llama, plan=replace(plan, codes=tuple(replace(x, bits=None) for x in plan.codes))
    )
    for attention in plain.attentions:
        code, exact = attention.code, attention.code.encode

        def rounded(keys, values, exact=exact):
            return {part: fake_quantise(x, 4) for part, x in exact(keys, values).items()}

        code.encode = rounded
    torch.testing.assert_close(found, logits(plain, ids, 20), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_different_lengths_do_not_disturb_each_other(llama, ids, bits):
    engine = Engine.load(llama, plan=coded(llama, "unrotated", bits, 0.5))
    together = engine.new_cache(3, LENGTH)
    lengths = (5, 20, 33)
    for row, n in enumerate(lengths):
        engine.extend(together, ids[:n], row)
    found = engine.decode(together, torch.stack([ids[n] for n in lengths]))
    for row, n in enumerate(lengths):
        alone = engine.new_cache(1, LENGTH)
        engine.extend(alone, ids[:n])
        expected = engine.decode(alone, ids[n : n + 1])[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_half_precision(llama, ids, dtype):
    engine = Engine.load(llama, dtype=dtype, plan=coded(llama, "unrotated", 4))
    assert logits(engine, ids, 30).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("layers", "parts"), [(1, 2), (1, 1), (3, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_plan(llama, bits, layers, parts, dtype):
    for share, group in ((0.4, 32), (0.7, 5), (1.0, 16)):
        plan = coded(llama, "unrotated", bits, share, layers, parts, group=group)
        engine = Engine.load(llama, plan=plan, dtype=dtype)
        item = dtype.itemsize
        for tokens in (1, 63, 100):
            cache = engine.new_cache(1, tokens)
            assert cache.allocated_bytes == plan.cache_bytes(tokens, item)
        assert plan.bytes_per_token(item) == plan.cache_bytes(2, item) - plan.cache_bytes(1, item)
        expected = sum(
            -(-width * bits // 8) + 4 * -(-width // group)
            for code in plan.codes
            for width in code.widths
        )
        assert plan.bytes_per_token(item) == expected
        size = cache_size(engine)
        assert size.bytes_per_token == size.bytes_per_token_bf16 == expected


# ---------------------------------------------------------------------------------------- plans


def test_a_plan_with_bits_is_read_as_written(llama, tmp_path):
    plan = coded(llama, "rotated", 4, 0.5, group=16)
    plan.write(tmp_path / "p.plan")
    again = Plan.read(tmp_path / "p.plan")
    assert again.codes == plan.codes
    assert (again.codes[0].bits, again.codes[0].group) == (4, 16)
    again.write(tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == (tmp_path / "p.plan").read_bytes()
    coded(llama, "rotated", None, 0.5).write(tmp_path / "old.plan")
    assert Plan.read(tmp_path / "old.plan").codes[0].bits is None


@pytest.mark.parametrize("wrong", [0, 1, 5, 16])
def test_bits_that_cannot_be_packed_are_refused(wrong):
    with pytest.raises(PlanError, match=f"2, 3, 4 or 8 bits, not of {wrong}"):
        CodePlan("rotated", 1, (4, 4), bits=wrong)
    with pytest.raises(PlanError, match="groups of 0 numbers"):
        CodePlan("rotated", 1, (4, 4), bits=4, group=0)


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("allocation", ["even", "spectrum"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_budget_is_met_from_below_and_grows_widths_only(bits, allocation, parts):
    sizes = (3, 1, 2)
    generator = torch.Generator().manual_seed(1)
    codes = [CodePlan("rotated", n, (n * 64,) * parts, bits=bits, group=32) for n in sizes]
    spectra = [
        [torch.rand(w, generator=generator).sort(descending=True).values for w in code.widths]
        for code in codes
    ]
    most = sum(code.token_bytes(2) for code in codes)
    before = [(0,) * parts] * len(codes)
    for budget in range(most // 2, most + 20, 7):
        found = share_budget(codes, spectra, allocation, budget, 2)
        taken = sum(code.token_bytes(2) for code in found)
        widths = [code.widths for code in found]
        assert taken <= budget
        assert all(
            w >= old
            for now, past in zip(widths, before, strict=True)
            for w, old in zip(now, past, strict=True)
        )
        before = widths
        if budget < most:
            # What is left would not have paid for what comes next: a number of every part of the
            # last code, or eight rows, and the scale of a new group.
            row = 2 if bits is None else bits / 8
            scale = 0 if bits is None else 4
            last = (parts * row + parts * scale + 1) * sum(sizes) + sum(sizes)
            assert budget - taken < (last if allocation == "even" else 8 * row + scale + 1e-9)
    assert before == [code.widths for code in codes]


# ---------------------------------------------------------------------------------------- methods


def test_levelling_changes_nothing_but_what_is_stored():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(500, 12, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -3, 12, dtype=torch.float64)
    )
    y = y + 5
    mean = y.mean(0)
    covariance = y.T @ y / len(y) - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    rows = vectors.T.flip(0)
    fitted = Fitted(Projection(rows, rows.T, mean), values.flip(0))
    for power in (0.0, 0.25, 1.0):
        found = levelled(fitted, covariance, power)  # it codes about the mean
        for width in (3, 7, 12):
            ours, theirs = found.projection.cut(width), fitted.projection.cut(width)
            torch.testing.assert_close(ours.decode @ ours.encode, theirs.decode @ theirs.encode)
        z = (y - found.projection.mean) @ found.projection.encode.T
        torch.testing.assert_close(
            z.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-9, rtol=0
        )
        expected = (fitted.spectrum / fitted.spectrum[0]) ** power
        torch.testing.assert_close(z.var(0, correction=0), expected)


def test_rows_that_store_nothing_stay_finite():
    covariance = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for spectrum in (covariance.diag(), torch.zeros(3, dtype=torch.float64)):
        found = levelled(Fitted(Projection(eye, eye, mean), spectrum), covariance)
        for x in vars(found.projection).values():
            assert x.float().isfinite().all()


def test_tuning_lowers_the_error_on_tokens_it_has_not_seen(llama):
    code = CodePlan("unrotated", 1, (20, 20), bits=2, group=8)
    stream = LayerStream(llama)
    windows = calibration_text().windows(llama.tokenizer(), 256, 12)
    y = tokens_of(stream, stream.layer(0), stream.embed(windows), 4)
    assert y.shape == (12, 252, 64)
    own, held = y[:-2].flatten(0, 1), y[-2:].flatten(0, 1)
    found, again = (tune(own, held, code, 60, seed=0) for _ in range(2))
    start = tune(own, held, code, 0, seed=0)
    for part, one in found.items():
        assert one.after < 0.97 * one.before
        assert start[part].after == start[part].before == one.before
        assert one.fitted.projection.encode.shape == (20, 32)
        for name, x in vars(one.fitted.projection).items():
            assert torch.equal(x, getattr(again[part].fitted.projection, name))
            before = getattr(start[part].fitted.projection, name).float()
            assert torch.equal(x, before) == (name == "mean")
        assert not one.fitted.projection.mean.any()  # about a mean, zero values are lost


def test_what_tuning_makes_worse_is_thrown_away(llama, monkeypatch):
    monkeypatch.setattr("kvtool.calibrate.tuned.RATE", 100.0)
    y = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    code = CodePlan("unrotated", 1, (20, 20), bits=4)
    found = tune(y[:300], y[300:], code, 3, seed=0)
    start = tune(y[:300], y[300:], code, 0, seed=0)
    for part, one in found.items():
        assert one.after == one.before
        assert torch.equal(one.fitted.projection.encode, start[part].fitted.projection.encode)


def test_tokens_are_keys_before_rope_and_values(llama):
    stream = LayerStream(llama)
    windows = calibration_text().windows(llama.tokenizer(), 32, 3)
    hidden = stream.embed(windows)
    layer = stream.layer(0)
    _, k, v = layer.attention.project(layer.normed(stream.embed(windows)))
    expected = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)[:, 5:]
    torch.testing.assert_close(tokens_of(stream, layer, hidden, 5), expected)


@pytest.mark.parametrize("method", ["aware", "cskv", "xkv", "palu", "asvd", "pca"])
def test_every_method_with_bits_meets_its_budget_and_is_judged_as_it_runs(llama, ids, method):
    together = 2 if method == "xkv" else 1
    options = replace(SMALL, method=method, bits=4, together=together, tuning=5)
    budget = int(0.2 * coded(llama, "rotated", None).native_bytes(400, 2))
    plan = calibrate_projections(llama, options, budget, 2)
    assert all(code.bits == 4 for code in plan.codes)
    assert 0.85 * budget < plan.cache_bytes(400, 2) <= budget
    engine = Engine.load(llama, plan=plan)
    assert engine.new_cache(1, 400).allocated_bytes == plan.cache_bytes(400, 4)
    # The calibration's own reading of a coded past agrees with the runtime's.
    model = TailModel(LayerStream(llama))
    past = read_past(model, ids, 1)
    codes = []
    for index, code in enumerate(plan.codes):
        names = ("encode", "decode", "mean")
        codes.append(
            (
                code,
                {
                    part: Projection(*(plan.tensors[f"codes.{index}.{part}.{n}"] for n in names))
                    for part in code.parts
                },
            )
        )
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, ids[:-1])
    found = divergence(past.expected, engine.decode(cache, ids[-1:]))
    assert found == pytest.approx(measure(model, [past], codes), rel=2e-2)


def test_ranks_by_fisher_do_not_change_how_rows_are_levelled(llama):
    options = replace(SMALL, method="palu", bits=4)
    plan = calibrate_projections(llama, options, 10**9, 2)
    text = StatisticsOptions(tokens=options.tokens, sinks=options.sink)
    for index, layer in enumerate(map(collect(llama, text).layer, range(3))):
        second, width = layer.joint.second / layer.joint.tokens, plan.base.channels
        for part, own in (("keys", slice(0, width)), ("values", slice(width, None))):
            expected = levelled(cskv.fit(layer, 2)[part], second[own, own]).projection.encode
            found = plan.tensors[f"codes.{index}.{part}.encode"]
            torch.testing.assert_close(found, expected.float())


def test_full_width_at_eight_bits_is_close_to_dense(llama, ids):
    expected = logits(Engine.load(llama), ids, 1)
    for method in ("aware", "cskv", "pca"):
        options = replace(SMALL, method=method, bits=8, tuning=0)
        plan = calibrate_projections(llama, options, 10**9, 2)
        assert [code.widths for code in plan.codes] == [
            code.widths for code in empty_codes(plan, options)
        ]
        found = logits(Engine.load(llama, plan=plan), ids, 20)
        assert divergence(expected, found) < 2e-3


def test_a_narrower_slice_of_a_tuned_plan_is_one_but_not_a_wider(llama):
    options = replace(SMALL, method="cskv", bits=4, tuning=3)
    budget = int(0.2 * coded(llama, "rotated", None).native_bytes(400, 2))
    plan = calibrate_projections(llama, options, budget, 2)
    narrow = cut(plan, budget * 9 // 10, 400, 2)
    assert narrow.cache_bytes(400, 2) <= budget * 9 // 10
    assert narrow.codes[0].width < plan.codes[0].width
    assert cut(plan, 2 * budget, 400, 2).codes == plan.codes
    errors = plan.provenance[0]["reconstruction"]
    assert len(errors["before"]) == len(errors["after"]) == 2 * plan.base.layers
    assert all(a <= b for a, b in zip(errors["after"], errors["before"], strict=True))
    assert JUDGED == 2


def test_without_bits_a_plan_is_what_it_was(llama):
    """Means stay zero, all rows are there, nothing is tuned."""
    plan = calibrate_projections(llama, replace(SMALL, method="cskv"), 10**9, 2)
    assert "reconstruction" not in plan.provenance[0]
    assert plan.codes[0].widths == (plan.base.channels,) * 2
    assert not plan.tensors["codes.0.keys.mean"].any()


def test_a_budget_too_small_for_scales_is_refused(llama):
    options = replace(SMALL, bits=2, context=11)
    with pytest.raises(UsageError, match="is too small: the first 3 and last 7 tokens"):
        calibrate_projections(llama, options, 1000, 2)


def test_the_command_takes_bits_and_shows_them(llama, tmp_path, capsys):
    model, plan = str(llama.path), tmp_path / "p"
    words = ["calibrate", "projections", model, "--tokens", "1024", "--context", "400", "-q"]
    words += ["--sink", "2", "--window", "6", "--kv-budget", "20%"]
    assert run_command([*words, "-o", str(plan), "--bits", "5"]) == 2
    assert "2, 3, 4 or 8 bits" in " ".join(capsys.readouterr().err.split())
    assert not plan.exists()
    assert run_command([*words, "-o", str(plan), "--bits", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 bits each, a scale and a minimum (4 bytes) for 32" in shown
    assert Plan.read(plan).codes[0].bits == 4
