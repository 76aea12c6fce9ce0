"""Retrieval heads: a score for every KV head, by one of several methods, and the plan cut from it.

The question is always the same: how much does the model need this head to see its whole past? All
methods but `entropy` ask it while the model recalls something (`tasks.py`), so whether the model
can recall at all is checked first. Scores of different methods have different units; only their
order is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvtool.calibrate.ablation import ablation_scores
from kvtool.calibrate.attention_scores import attention_scores
from kvtool.calibrate.duo import GatedModel, Mix, teach
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics import memory_bytes as statistics_memory
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import Reading, TailModel, Window
from kvtool.calibrate.tasks import Kind, RecallTask
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import Corpus, calibration_text
from kvtool.distill import Training, train
from kvtool.errors import CalibrationError, UsageError
from kvtool.layout import describe, with_heads
from kvtool.plan import Plan, Prefill, base_of, check_can_drop, provenance_of, whole_layers
from kvtool.progress import Progress, silent

Method = Literal["ablation", "duo", "attention", "semantic", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

LENGTHS = (1024, 2048)
"""Tokens of the recall samples, where nothing else is asked for and the model's context allows."""
MIN_ACCURACY, MAX_NLL = 0.8, 0.5
"""What a model must reach on a recall task for its heads to be judged by it."""

TIE = 1e-6
"""Far below one copied token in any number of samples."""


@dataclass(frozen=True)
class HeadOptions:
    """Everything that determines the scores besides the model.

    Attributes:
        method: `ablation` streams each head alone; `duo` trains gates (DuoAttention); `attention`
            is Wu et al.'s retrieval score, `semantic` CompressKV's; `entropy` is UNComp's.
        sink, window: What a streaming head will see.
        prefill: Whether a prompt is read densely before it is dropped, or streamed.
        lengths: Tokens of the recall samples; None is `LENGTHS`.
        samples: How many of them.
        mix, steps, penalty: Of `duo`: whose full attention is mixed in, training steps, weight of
            the penalty on the gates.
        data: Text around the recall tasks; None is Python's own documentation.
    """

    method: Method = "ablation"
    sink: int = 16
    window: int = 256
    prefill: Prefill = "dense"
    lengths: tuple[int, ...] | None = None
    samples: int = 8
    mix: Mix = "self"
    steps: int = 200
    penalty: float = 0.05
    data: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class RecallCheck:
    """How well the model itself does one recall task.

    Counted are the answer tokens behind the first of each key: the first may need an ordinal to be
    counted, which small models cannot, and the others need nothing but the context.

    Attributes:
        nll: Mean negative log-likelihood in nats.
        accuracy: Share of tokens that are the model's most likely one.
    """

    kind: Kind
    nll: float
    accuracy: float

    @property
    def passed(self) -> bool:
        """Whether the model retrieves well enough for its heads to show it."""
        return self.accuracy >= MIN_ACCURACY and self.nll <= MAX_NLL

    def __str__(self) -> str:
        return f"{self.kind}: {self.accuracy:.0%} of the tokens, {self.nll:.2f} nats"


@dataclass(frozen=True)
class HeadScores:
    """What a method says of every KV head.

    Attributes:
        scores: `[L, H]` float64, higher: needs its whole past more. Those of layers with a sliding
            window or a state mean nothing.
        checks: How the model did on the recall tasks that were tried.
        details: Numbers of the method, for the provenance.
    """

    scores: Tensor
    corpus: str
    tokens: int
    checks: list[RecallCheck] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def calibrate_heads(
    checkpoint: Checkpoint,
    options: HeadOptions,
    *,
    device: str = "cpu",
    folder: Path | None = None,
    resume: bool = True,
    report: Progress = silent,
) -> Plan:
    """Scores the heads of a model; in the plan that comes back all of them are full still.

    Args:
        folder: Where `duo` keeps its training state, and `ablation` its sums.

    Raises:
        UnsupportedModelError: The attention cannot stream.
        CalibrationError: The model does not recall, so that nothing can be found out.
        UsageError: Options do not fit each other or the model.
    """
    base = base_of(checkpoint)
    check_options(checkpoint, options)
    found = score_heads(
        checkpoint, options, device=device, folder=folder, resume=resume, report=report
    )
    provenance = provenance_of(
        options.method,
        asdict(options),
        found.corpus,
        found.tokens,
        recall=[{**asdict(check), "passed": check.passed} for check in found.checks],
        **found.details,
    )
    return Plan(
        base,
        whole_layers(checkpoint),
        prefill=options.prefill,
        provenance=(provenance,),
        scores=found.scores.float(),
    )


def check_options(checkpoint: Checkpoint, options: HeadOptions) -> None:
    """Refuses what cannot work before any weight is read."""
    stream = LayerStream(checkpoint)
    check_can_drop(checkpoint)
    if options.sink < 0 or options.window < 1:
        raise UsageError("--sink must be at least 0 and --window at least 1")
    if options.samples < 1 or options.steps < 1 or options.penalty < 0:
        raise UsageError("--samples and --steps must be at least 1, --penalty at least 0")
    if options.method == "entropy":
        return  # it reads plain text
    for length in sample_lengths(options, int(stream.config.max_position_embeddings)):
        if length <= options.sink + options.window:
            raise UsageError(
                f"a text of {length} tokens does not leave the {options.sink + options.window} "
                "tokens that a streaming head sees, so no head would be missed",
                hint="use a longer --length or a smaller --window",
            )


def memory_bytes(checkpoint: Checkpoint, options: HeadOptions) -> int:
    """About what the calibration holds at once, besides Python and its libraries.

    The model in fp32, and keys and values of all contexts; `entropy` holds one layer at a time.
    """
    if options.method == "entropy":
        stream, tokens = LayerStream(checkpoint), StatisticsOptions().tokens
        return statistics_memory(stream, tokens)
    layouts = describe(checkpoint.hf_config())
    weights = checkpoint.parameters
    lengths = sample_lengths(options, int(checkpoint.hf_config().max_position_embeddings))
    tokens = sum(lengths[i % len(lengths)] for i in range(options.samples))
    kept = tokens * sum(layout.cached_values for layout in layouts)
    states = sum(layout.mixer.state_values for layout in layouts if layout.mixer)
    return 4 * (weights + kept + options.samples * states)


def sample_lengths(options: HeadOptions, context: int) -> list[int]:
    """Tokens of the recall samples.

    Raises:
        UsageError: The model has no such positions.
    """
    if options.lengths is None:
        return [length for length in LENGTHS if length <= context] or [context]
    for length in options.lengths:
        if not 1 <= length <= context:
            raise UsageError(
                f"--length {length} does not fit the model's context of {context} tokens"
            )
    return list(options.lengths)


def score_heads(
    checkpoint: Checkpoint,
    options: HeadOptions,
    *,
    device: str,
    folder: Path | None,
    resume: bool,
    report: Progress,
) -> HeadScores:
    """The scores of one method."""
    if options.method == "entropy":
        return _entropy(checkpoint, options, report)
    corpus = calibration_text(options.data)
    model = TailModel(LayerStream(checkpoint), device)
    readings, checks = read_samples(model, checkpoint, corpus, options, report)
    window = Window(options.sink, options.window)
    details: dict[str, Any] = {}
    key = f"{checkpoint.fingerprint()} {corpus.id} {options}"
    if options.method == "ablation":
        scores = ablation_scores(model, readings, window, report, folder, key, resume=resume)
    elif options.method == "duo":
        lessons = [teach(model, reading, options.mix) for reading in readings]
        student = GatedModel(model, window, options.mix, options.penalty, options.seed)
        log = train(
            student,
            lambda i: lessons[_shuffled(i, len(lessons), options.seed)],
            Training(options.steps, learning_rate=0.02, seed=options.seed),
            folder,
            key=key,
            resume=resume,
            report=report,
        )
        scores = student.alpha.detach().double().cpu()
        details = {name: log[-1][name] for name in ("loss", "distillation", "mean_gate")}
    else:
        retrieval, semantic = attention_scores(model, readings, report)
        # Most heads never copy and tie at 0: the attention they pay to the needle parts them.
        scores = semantic if options.method == "semantic" else retrieval + TIE * semantic
    tokens = sum(len(r.sample.context) + len(r.sample.tail) for r in readings)
    return HeadScores(scores, corpus.id, tokens, checks, details)


def read_samples(
    model: TailModel,
    checkpoint: Checkpoint,
    corpus: Corpus,
    options: HeadOptions,
    report: Progress,
) -> tuple[list[Reading], list[RecallCheck]]:
    """Samples of the tasks that the model can do: ordinals and names, or else repetition.

    Raises:
        CalibrationError: It can do none of them; the message tells how it did.
    """
    tokenizer = checkpoint.tokenizer()
    lengths = sample_lengths(options, int(checkpoint.hf_config().max_position_embeddings))
    heads = with_heads(model.layouts).kv_heads
    dense = torch.zeros(len(model.layers), heads, dtype=torch.bool)
    window = Window(options.sink, options.window)
    found: list[Reading] = []
    checks: list[RecallCheck] = []
    kinds: tuple[tuple[Kind, ...], ...] = (("ordinals", "names"), ("repetition",))
    for tried in kinds:
        count = -(-options.samples // len(tried))
        for kind in tried:
            task = RecallTask(tokenizer, corpus.documents, kind, seed=options.seed)
            readings, scored = [], []
            report(f"reading {kind}", 0, count)
            for i in range(count):
                reading = model.read(task.sample(lengths[i % len(lengths)]), options.prefill)
                scored.append(_recalled(model.recall(reading, dense, window), reading))
                readings.append(reading)
                report(f"reading {kind}", i + 1, count)
            nll, right = torch.cat(scored, dim=1).mean(dim=1).tolist()
            checks.append(RecallCheck(kind, nll, right))
            if checks[-1].passed:
                found += readings
        if found:
            return found, checks
    raise CalibrationError(
        "the model cannot do the recall tasks that show which heads do it ("
        + "; ".join(map(str, checks))
        + ")",
        hint=f"needed are {MIN_ACCURACY:.0%} and {MAX_NLL} nats; try a shorter --length, or "
        "--method entropy, which needs no task",
    )


def _recalled(log_probabilities: Tensor, reading: Reading) -> Tensor:
    """`[2, A']`: negative log-likelihood, and whether it is the likeliest, of non-first answers."""
    targets = reading.ids[reading.answers]
    nll = -log_probabilities.gather(1, targets[:, None])[:, 0]
    right = log_probabilities.argmax(-1) == targets
    follows = ~reading.sample.first[reading.sample.answers].to(nll.device)
    return torch.stack((nll[follows], right[follows].to(nll)))


def _entropy(checkpoint: Checkpoint, options: HeadOptions, report: Progress) -> HeadScores:
    """UNComp's truncated matrix entropy of the queries; of a group, the largest."""
    statistics = collect(
        checkpoint, StatisticsOptions(data=options.data, seed=options.seed), report=report
    )
    base, layers = base_of(checkpoint), whole_layers(checkpoint)
    scores = torch.zeros(base.layers, base.kv_heads, dtype=torch.float64)
    for index in (i for i, layer in enumerate(layers) if layer.kept is None):
        entropy = statistics.layer(index).query_entropy  # [Q]
        scores[index] = entropy.view(base.kv_heads, -1).amax(-1)
    return HeadScores(scores, statistics.metadata["corpus"], statistics.tokens)


def _shuffled(index: int, count: int, seed: int) -> int:
    """Which of `count` lessons is the `index`-th: each once per round, in a new order."""
    turn, place = divmod(index, count)
    generator = torch.Generator().manual_seed(seed + turn)
    return int(torch.randperm(count, generator=generator)[place])


def rank_correlation(scores: Sequence[Tensor]) -> Tensor:
    """Spearman's rank correlation of several `[L, H]` scores, `[N, N]`; ties share their rank."""
    ranks = []
    for score in scores:
        _, inverse, counts = (
            score.flatten().double().unique(return_inverse=True, return_counts=True)
        )
        middle = counts.cumsum(0) - (counts - 1) / 2
        ranks.append(middle[inverse])
    return torch.corrcoef(torch.stack(ranks)) if len(ranks) > 1 else torch.ones(1, 1)
