"""Plans that store a code of every token: what a method fits, and which widths a budget allows.

A method gives codes at full width with what each row is worth, so that a smaller budget is a slice
of the same plan. Layers with a sliding window or a state keep that and have no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvtool.calibrate import asvd, aware, cskv, matryoshka, palu, pca, xkv
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.felt import Felt, feel
from kvtool.calibrate.levelled import levelled
from kvtool.calibrate.past import Codes, Past, measure, read_past
from kvtool.calibrate.statistics import CONTEXT, WINDOW, StatisticsOptions, collect
from kvtool.calibrate.statistics import memory_bytes as memory_of_statistics
from kvtool.calibrate.statistics_file import LayerStatistics, Statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.students import LENGTH, FreeStudent, train_codes
from kvtool.calibrate.tail import TailModel
from kvtool.calibrate.tuned import tokens_of, tune
from kvtool.checkpoint import Checkpoint
from kvtool.codes import (
    STEP,
    Allocation,
    CodeKind,
    CodePlan,
    Fitted,
    Part,
    fit_codes,
    layers_of,
    share_budget,
)
from kvtool.corpus import calibration_text
from kvtool.distill import Amount
from kvtool.errors import PlanError, UsageError
from kvtool.factored import model_config
from kvtool.layout import describe
from kvtool.plan import Plan, Prefill, base_of, check_can_drop, provenance_of, whole_layers
from kvtool.progress import Progress, silent
from kvtool.slices import cut

Method = Literal["aware", "matryoshka", "cskv", "xkv", "palu", "asvd", "pca"]
METHODS: tuple[Method, ...] = get_args(Method)
Read = Literal["absorbed", "rebuilt"]
"""How keys are read: as they are stored (after RoPE), or rebuilt and rotated (before RoPE)."""

RATE = 2e-4
"""Learning rate of codes, as a share of each parameter's root mean square."""
AUTO = 64 * 1024
"""Tokens of a training of automatic length."""
JUDGED = 2
"""Windows of calibration text, not fitted to, by which codes are judged."""
_END = 128  # tokens of such a window that are read through the codes


@dataclass(frozen=True)
class ProjectionOptions:
    """Everything that determines the codes besides the model.

    Attributes:
        read: Of `aware`; the other methods say it themselves.
        together: Neighbouring layers that share a code, of `aware` and `xkv`.
        sink, window: Tokens that are kept exactly.
        context: Tokens of the sequence that a budget is for.
        train: How long the codes of `aware` (not at all if not given) or `matryoshka` are trained.
        search_ranks: Whether `matryoshka` searches a rank per head.
        bits: Of each number of a code; None keeps numbers.
        prefill: Of the plan.
        tuning: Steps by which a layer of `cskv` with bits is tuned.
    """

    method: Method = "aware"
    read: Read = "absorbed"
    together: int = 1
    sink: int = 4
    window: int = 64
    context: int = 4096
    train: Amount | None = None
    search_ranks: bool = False
    data: str | None = None
    tokens: int = 16384
    seed: int = 0
    bits: int | None = None
    prefill: Prefill = "dense"
    tuning: int = 300


@dataclass(frozen=True)
class _Found:
    """Codes with all rows that there are, and what is to be said of how they were made."""

    codes: list[CodePlan]
    fitted: list[dict[Part, Fitted]]
    corpus: str
    tokens: int
    losses: dict[str, Any]


def calibrate_projections(
    checkpoint: Checkpoint,
    options: ProjectionOptions,
    budget_bytes: int,
    itemsize: int,
    *,
    report: Progress = silent,
) -> Plan:
    """A plan whose cache takes at most `budget_bytes` for a sequence of `context` tokens.

    Args:
        itemsize: Bytes per cached number that the budget is stated for.

    Raises:
        UnsupportedModelError: All layers have a sliding window.
        UsageError: The budget is too small, or the text too short.
    """
    check_can_drop(checkpoint)
    start = Plan(base_of(checkpoint), whole_layers(checkpoint), options.prefill)
    check_budget(start, options, budget_bytes, itemsize)
    check_ring(checkpoint, options)
    budget = (budget_bytes, itemsize)
    if options.method == "matryoshka":
        found = _matryoshka(checkpoint, start, options, report)
    elif options.method in ("aware", "xkv"):
        found = _felt(checkpoint, start, options, budget, report)
    elif options.method == "cskv" and options.bits is not None:
        found = _tuned(checkpoint, start, options, budget, report)
    else:
        found = _per_layer(checkpoint, start, options, report)
    tensors: dict[str, Tensor] = {}
    for index, parts in enumerate(found.fitted):
        for part, fitted in parts.items():
            tensors |= fitted.tensors(index, part)
    asked = {**asdict(options), "budget_bytes": budget_bytes, "itemsize": itemsize}
    provenance = provenance_of(options.method, asked, found.corpus, found.tokens, **found.losses)
    plan = replace(
        start,
        provenance=(provenance,),
        codes=tuple(found.codes),
        allocation=allocation(options),
        tensors=tensors,
    )
    return cut(plan, budget_bytes, options.context, itemsize)


def allocation(options: ProjectionOptions) -> Allocation:
    """How the codes of a method share a budget."""
    return "spectrum" if options.method in ("aware", "palu") or options.search_ranks else "even"


def empty_codes(start: Plan, options: ProjectionOptions) -> list[CodePlan]:
    """What is coded together by a method, and how; at full width.

    Args:
        start: The plan that keeps everything.
    """
    absorbed = options.method == "aware" and options.read == "absorbed"
    rotated = absorbed or options.method in ("pca", "matryoshka")
    kind: CodeKind = "rotated" if rotated else "unrotated"
    layers, channels = len(start.planned_layers), start.base.channels
    together = min(options.together, layers) if options.method in ("aware", "xkv") else 1
    sizes = [min(together, layers - i) for i in range(0, layers, together)]
    parts = 1 if options.method == "aware" and not absorbed else 2
    plain = [
        CodePlan(kind, n, (n * channels * 2 // parts,) * parts, options.sink, options.window)
        for n in sizes
    ]
    return [replace(code, bits=options.bits) for code in plain]


def check_budget(start: Plan, options: ProjectionOptions, budget_bytes: int, itemsize: int) -> None:
    """Raises UsageError unless the narrowest codes fit the budget."""
    try:
        _even_codes(start, options, budget_bytes, itemsize)
    except PlanError as error:
        raise UsageError(str(error)) from error


def check_keys(checkpoint: Checkpoint, options: ProjectionOptions) -> None:
    """Raises UnsupportedModelError where the method cannot code the keys of the model."""
    if options.method == "asvd":
        asvd.check(describe(checkpoint.hf_config()))


def check_ring(checkpoint: Checkpoint, options: ProjectionOptions) -> None:
    """Raises UsageError where nothing of a window that is read would be coded."""
    most = LENGTH if options.train is not None or options.method == "matryoshka" else WINDOW
    length = min(most, int(checkpoint.hf_config().max_position_embeddings))
    if 2 * (options.sink + options.window) > length:
        raise UsageError(
            f"codes are fitted on windows of {length} tokens, and --sink {options.sink} with "
            f"--window {options.window} leave too little of them to be coded",
            hint=f"both together may be {length // 2} tokens",
        )


def _even_codes(
    start: Plan, options: ProjectionOptions, budget_bytes: int, itemsize: int
) -> tuple[CodePlan, ...]:
    """Codes in that budget if all rows are worth the same."""
    codes = empty_codes(start, options)
    rows = [[torch.ones(width) for width in code.widths] for code in codes]
    return fit_codes(
        codes, rows, allocation(options), budget_bytes, options.context, start.base.channels,
        itemsize, start.bounded_bytes(options.context, itemsize),
    )  # fmt: skip


def _statistics(checkpoint: Checkpoint, options: ProjectionOptions, report: Progress) -> Statistics:
    wanted = StatisticsOptions(
        data=options.data, tokens=options.tokens, sinks=options.sink, seed=options.seed
    )
    return collect(checkpoint, wanted, report=report)


def _per_layer(
    checkpoint: Checkpoint, start: Plan, options: ProjectionOptions, report: Progress
) -> _Found:
    """The methods that look at one layer after the other."""
    method, layers = options.method, start.planned_layers
    if method == "asvd":
        windows, _ = _windows(checkpoint, options, 0)
        everywhere = asvd.fit(LayerStream(checkpoint), windows)
        fitted = [everywhere[i] for i in layers]
        if options.bits is None:  # it needs no statistics
            corpus, tokens = calibration_text(options.data).id, windows.numel()
            return _Found(empty_codes(start, options), fitted, corpus, tokens, {})
    statistics = _statistics(checkpoint, options, report)
    if method != "asvd":
        fit = pca.fit if method == "pca" else cskv.fit
        fitted = [fit(statistics.layer(i), start.base.kv_heads) for i in layers]
    if options.bits is not None:  # by what rows are worth, which Fisher's ranks do not say
        fitted = [
            _levelled(parts, statistics.layer(i), method == "pca")
            for i, parts in zip(layers, fitted, strict=True)
        ]
    if method == "palu":
        windows, _ = _windows(checkpoint, options, 0)
        keys, values = palu.fisher(checkpoint, windows, report)
        for i, parts in enumerate(fitted):
            parts["keys"] = palu.ranked(parts["keys"], float(keys[i]))
            parts["values"] = palu.ranked(parts["values"], float(values[i]))
    corpus = str(statistics.metadata["corpus"])
    return _Found(empty_codes(start, options), fitted, corpus, statistics.tokens, {})


def _levelled(
    fitted: dict[Part, Fitted], statistics: LayerStatistics, rotated: bool
) -> dict[Part, Fitted]:
    """Keys and values of a layer, ready for few bits."""
    width = len(statistics.joint.mean) // 2
    places: dict[Part, slice] = {"keys": slice(0, width), "values": slice(width, None)}
    found: dict[Part, Fitted] = {}
    for part, own in places.items():
        mean, covariance = statistics.joint.mean[own], statistics.joint.covariance[own, own]
        if rotated and part == "keys":
            mean, covariance = statistics.rotated_keys.mean, statistics.rotated_keys.covariance
        shift = mean - fitted[part].projection.mean.double()
        found[part] = levelled(fitted[part], covariance + shift[:, None] * shift)
    return found


def _tuned(
    checkpoint: Checkpoint,
    start: Plan,
    options: ProjectionOptions,
    budget: tuple[int, int],
    report: Progress,
) -> _Found:
    """`cskv` with bits, at the widths of the budget, bytes and bytes per number."""
    codes = _even_codes(start, options, *budget)
    windows, _ = _windows(checkpoint, options, JUDGED)
    stream = LayerStream(checkpoint)
    hidden = stream.embed(windows)
    fitted: list[dict[Part, Fitted]] = []
    errors: dict[str, list[float]] = {"before": [], "after": []}
    of_layer = dict(zip(start.planned_layers, codes, strict=True))
    report("tuning", 0, len(codes))
    for index in range(len(stream)):
        layer = stream.layer(index)
        if (code := of_layer.get(index)) is None:
            layer.run(hidden, stream.exact_attention(layer), batch=1)
            continue
        y = tokens_of(stream, layer, hidden, options.sink)
        own, held = (x.flatten(0, 1) for x in y.split([len(y) - JUDGED, JUDGED]))
        found = tune(own, held, code, options.tuning, options.seed)
        fitted.append({part: one.fitted for part, one in found.items()})
        errors["before"] += [one.before for one in found.values()]
        errors["after"] += [one.after for one in found.values()]
        report("tuning", len(fitted), len(codes))
    tokens = (len(windows) - JUDGED) * windows.shape[1]
    losses = {"reconstruction": errors}
    return _Found(list(codes), fitted, calibration_text(options.data).id, tokens, losses)


def _felt(
    checkpoint: Checkpoint,
    start: Plan,
    options: ProjectionOptions,
    budget: tuple[int, int],
    report: Progress,
) -> _Found:
    """The methods that look at several layers together."""
    codes = empty_codes(start, options)
    windows, offsets = _windows(checkpoint, options, JUDGED)
    fitted_to = len(windows) - JUDGED
    ring = (options.sink, options.window)
    felt = feel(
        WholeModel(checkpoint), windows[:fitted_to], offsets[:fitted_to],
        layers_of(codes, start.planned_layers), codes[0].kind, ring, options.seed, report,
    )  # fmt: skip
    report("fitting", 0, len(codes))
    fitted = []
    for done, one in enumerate(felt):
        own = options.method == "aware"
        fitted.append(aware.fit(one, codes[done].parts) if own else xkv.fit(one))
        if options.bits is not None:
            fitted[-1] = _levelled_together(fitted[-1], one)
        report("fitting", done + 1, len(codes))
    corpus, tokens = calibration_text(options.data).id, fitted_to * windows.shape[1]
    if options.method != "aware":
        return _Found(codes, fitted, corpus, tokens, {})
    model, end = TailModel(LayerStream(checkpoint)), min(_END, windows.shape[1] // 2)
    pasts = [read_past(model, windows[i], end, offsets[i]) for i in range(fitted_to, len(windows))]
    fitted, losses = judged(model, pasts, codes, fitted, report)
    if options.train is not None:
        spectra = [[x.spectrum for x in parts.values()] for parts in fitted]
        cut = fit_codes(
            codes, spectra, "spectrum", budget[0], options.context, start.base.channels, budget[1],
            start.bounded_bytes(options.context, budget[1]),
        )  # fmt: skip
        student = FreeStudent(model, cut, fitted, "spectrum")
        losses |= train_codes(
            student, checkpoint, options.train, RATE, options.data, options.seed, report
        )
        codes, fitted = list(cut), student.fitted()
        ready = [
            (x, {part: _single(y) for part, y in parts.items()})
            for x, parts in zip(codes, fitted, strict=True)
        ]
        losses["measured_trained"] = measure(model, pasts, ready)
    return _Found(codes, fitted, corpus, tokens, losses)


def _matryoshka(
    checkpoint: Checkpoint, start: Plan, options: ProjectionOptions, report: Progress
) -> _Found:
    """Trained orthogonal bases, and ranks if they are searched."""
    statistics, heads = _statistics(checkpoint, options, report), start.base.kv_heads
    principal = [pca.fit(statistics.layer(i), heads) for i in start.planned_layers]
    model = TailModel(LayerStream(checkpoint))
    ring = (options.sink, options.window)
    student = matryoshka.MatryoshkaStudent(model, principal, heads, ring)
    amount = options.train or Amount(tokens=AUTO)
    losses: dict[str, Any] = train_codes(
        student, checkpoint, amount, matryoshka.RATE, options.data, options.seed, report
    )
    fitted = student.fitted()
    if options.search_ranks:
        windows, offsets = _windows(checkpoint, options, 0)
        past = read_past(
            model, windows[0], min(matryoshka.SEARCHED, windows.shape[1] // 2), offsets[0]
        )
        fitted = matryoshka.ranked(fitted, matryoshka.greedy_ranks(student, past, report))
    corpus = str(statistics.metadata["corpus"])
    return _Found(empty_codes(start, options), fitted, corpus, statistics.tokens, losses)


def _levelled_together(fitted: dict[Part, Fitted], felt: Felt) -> dict[Part, Fitted]:
    """Of several layers, ready for few bits; these codes have no mean."""
    second = felt.second / felt.tokens
    pieces = torch.arange(len(second)).chunk(len(fitted))
    return {
        part: levelled(one, second[at][:, at])
        for (part, one), at in zip(fitted.items(), pieces, strict=True)
    }


def judged(
    model: TailModel,
    pasts: Sequence[Past],
    codes: Sequence[CodePlan],
    fitted: Sequence[dict[Part, Fitted]],
    report: Progress,
) -> tuple[list[dict[Part, Fitted]], dict[str, Any]]:
    """Measures each code alone, cut down, and puts all spectra into the nats that it costs.

    The quadratic form knows which rows of a code matter, but not how far the errors of many tokens
    add up. So each code's spectrum is scaled by what the code alone costs, over what was predicted;
    without its bits, whose cost is no row's. All codes together are cut to a quarter of their rows
    for that, whatever the budget: another budget is then a slice of the same plan.

    Returns:
        The codes with their new spectra; and by code `predicted`, `measured` loss in nats at these
        `widths`, with the loss of all codes together, bits and all, `measured_together`.
    """
    spectra = [[x.spectrum for x in parts.values()] for parts in fitted]
    rows = sum(len(x) for parts in spectra for x in parts)
    floor = sum(min(STEP, len(x)) for parts in spectra for x in parts)
    plain = [replace(code, bits=None) for code in codes]
    chosen = share_budget(plain, spectra, "spectrum", max(floor, rows // 4))
    ready: Codes = [
        (code, {part: _single(one) for part, one in parts.items()})
        for code, parts in zip(chosen, fitted, strict=True)
    ]
    predicted = [
        sum(float(one.spectrum[w:].sum()) for one, w in zip(p.values(), c.widths, strict=True))
        for c, p in zip(chosen, fitted, strict=True)
    ]
    measured = []
    report("judging", 0, len(codes) + 1)
    for index in range(len(codes)):
        measured.append(measure(model, pasts, ready, index))
        report("judging", index + 1, len(codes) + 1)
    stored = [(replace(x, bits=codes[0].bits), projections) for x, projections in ready]
    together = measure(model, pasts, stored)
    report("judging", len(codes) + 1, len(codes) + 1)
    scaled = [
        {part: Fitted(one.projection, one.spectrum * scale) for part, one in parts.items()}
        for parts, scale in zip(fitted, _scales(predicted, measured), strict=True)
    ]
    losses = {
        "predicted": predicted,
        "measured": measured,
        "measured_together": together,
        "widths": [list(code.widths) for code in chosen],
    }
    return scaled, losses


def _scales(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    """What each code costs over what was predicted; the median where either is only noise."""
    ratios = torch.tensor(measured, dtype=torch.float64) / torch.tensor(predicted).clamp(min=1e-30)
    clear = (torch.tensor(predicted) > 1e-9) & (torch.tensor(measured) > 1e-7)
    usual = float(ratios[clear].median()) if clear.any() else 1.0
    return [float(r) if c else usual for r, c in zip(ratios, clear, strict=True)]


def _single(fitted: Fitted) -> Any:
    return replace(
        fitted.projection,
        **{name: value.float() for name, value in vars(fitted.projection).items()},
    )


def _windows(
    checkpoint: Checkpoint, options: ProjectionOptions, more: int
) -> tuple[Tensor, list[int]]:
    return text_windows(checkpoint, options.data, options.tokens, options.seed, more)


def text_windows(
    checkpoint: Checkpoint, data: str | None, tokens: int, seed: int, more: int = 0
) -> tuple[Tensor, list[int]]:
    """Windows `[N + more, S]` of calibration text, and the positions at which they begin.

    Raises:
        UsageError: The tokens are less than a window.
    """
    limit = int(model_config(checkpoint).max_position_embeddings)
    length = min(WINDOW, limit)
    count = tokens // length
    if count < 1:
        raise UsageError(f"--tokens {tokens} is less than one window of {length}")
    tokenizer, corpus = checkpoint.tokenizer(), calibration_text(data)
    ids = corpus.windows(tokenizer, length, count + more, seed, StatisticsOptions.chat)
    generator = torch.Generator().manual_seed(seed)
    last = max(length, min(CONTEXT, limit)) - length
    return ids, torch.randint(0, last + 1, (len(ids),), generator=generator).tolist()


def memory_bytes(checkpoint: Checkpoint, start: Plan, options: ProjectionOptions) -> int:
    """About what a calibration holds at once, besides Python and its libraries."""
    weights, base = 4 * checkpoint.parameters, start.base
    if options.method == "cskv" and options.bits is not None:
        width = LayerStream(checkpoint).columns.width + 6 * base.channels
        return 4 * (options.tokens + JUDGED * WINDOW) * width
    if options.method in ("pca", "cskv"):
        return memory_of_statistics(LayerStream(checkpoint), options.tokens)
    if options.method == "asvd":
        return 4 * options.tokens * LayerStream(checkpoint).columns.width
    length = min(WINDOW, int(checkpoint.hf_config().max_position_embeddings))
    seen = 4 * 4 * sum(x.cached_values for x in describe(checkpoint.hf_config())) * length
    sums = sum(8 * 3 * (2 * x.layers * base.channels) ** 2 for x in empty_codes(start, options))
    return weights + seen + sums
