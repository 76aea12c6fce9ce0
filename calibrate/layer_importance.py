"""Which attention layers a model can do without: left out one by one, then replaced for a trial.

After Apriel-H1 (arXiv 2511.02651): layers are first ranked by *leaving each out* alone, and then by
*probes*, in batches. Every layer gets a Mamba-2 mixer, solved in closed form and aligned for some
steps; with the layers chosen so far replaced, each of the next candidates is tried in addition, the
best of them are chosen, and the others ranked anew, as layers make up for each other.

Damage is counted where it matters: KL(original ‖ changed) over text, and over the answers of recall
tasks, which plain text hardly needs. The two, in nats, are added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvtool import distill
from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate import statistics
from kvtool.calibrate.lessons import lessons
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.tasks import Kind, RecallTask
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text
from kvtool.distill import Training
from kvtool.divergence import kl_divergence
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.hybrid import Alignment, HybridModel
from kvtool.layout import PLAIN
from kvtool.progress import Progress, silent, telling
from kvtool.replacements import seeded_mixer

WINDOW, WINDOW_CUDA = 512, 1024
"""Tokens of a text."""
TEXTS = 4
"""Of them, that damage is counted on, and as many recall tasks."""
SOLVE = 16
"""Texts that read-outs are solved on."""
WIDER = 3
"""Candidates of a round, by layers chosen in it."""
_KINDS: tuple[Kind, ...] = ("names", "ordinals")


@dataclass(frozen=True)
class ImportanceOptions:
    """How layers are ranked.

    Attributes:
        count: Layers that are ranked by probes; the others keep the order of leaving them out.
        batch: Layers chosen in a round.
        steps: Of alignment before the probes; 0 probes what the closed form gives.
        data: Text; `None` is Python's own documentation.
        tokens: Of calibration text, for how far heads look back.
    """

    count: int | None = None
    batch: int = 4
    steps: int = 40
    data: str | None = None
    tokens: int = 16384
    seed: int = 0


@dataclass(frozen=True)
class LayerScore:
    """Of one layer; KL in nats.

    Attributes:
        text, recall: What leaving it out alone costs.
        probe: What replacing it costs beside all that are ranked before it in earlier rounds.
        round: In which it was chosen, from 1; None where it was not probed.
    """

    layer: int
    text: float
    recall: float
    probe: float | None = None
    round: int | None = None

    @property
    def left_out(self) -> float:
        """Both together."""
        return self.text + self.recall


class _Nothing(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class _Judge:
    """Damage on texts and recall tasks, whose original predictions are there once."""

    def __init__(self, hybrid: HybridModel, texts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.texts = texts
        self.told = [self._states(hybrid, ids, at, ()) for ids, at in texts]

    @torch.no_grad()
    def __call__(self, hybrid: HybridModel, replaced: Collection[int]) -> tuple[float, float]:
        """Mean KL over the positions of plain text, and over those of recall."""
        found: list[list[float]] = [[], []]
        for i, ((ids, at), told) in enumerate(zip(self.texts, self.told, strict=True)):
            states = self._states(hybrid, ids, at, replaced)
            total = 0.0
            for p, q in zip(told.split(256), states.split(256), strict=True):
                log_p, log_q = ((x @ hybrid.head.T).float().log_softmax(-1) for x in (p, q))
                total += float(kl_divergence(log_p, log_q).sum())
            found[i >= TEXTS].append(total / len(at))
        text, recall = (sum(values) / len(values) if values else 0.0 for values in found)
        return text, recall

    @torch.no_grad()
    def _states(
        self, hybrid: HybridModel, ids: Tensor, at: Tensor, replaced: Collection[int]
    ) -> Tensor:
        states = hybrid.states(ids[None].to(hybrid.device), replaced)
        return states[0, at.to(hybrid.device)]


def rank_layers(
    checkpoint: Checkpoint,
    options: ImportanceOptions,
    reach: Sequence[Tensor],
    *,
    device: str = "cpu",
    report: Progress = silent,
) -> list[LayerScore]:
    """All layers, the least important first.

    Args:
        reach: By layer `[Q]`, see `LayerStatistics.reach`.

    Raises:
        UsageError: The text is too short.
        UnsupportedModelError: The model is of another type than those that can be converted.
    """
    _check_family(checkpoint)
    layers = int(checkpoint.hf_config().num_hidden_layers)
    texts = _texts(checkpoint, options, device)
    alone = HybridModel(
        checkpoint.load_transformers(torch.float32, device), range(layers), lambda *_: _Nothing()
    )
    judge = _Judge(alone, texts)
    every = telling(report, "leaving out", range(layers), layers)
    scores = [LayerScore(layer, *judge(alone, {layer})) for layer in every]
    del alone
    scores.sort(key=lambda score: score.left_out)
    count = layers // 2 if options.count is None else min(options.count, layers)
    if count == 0:
        return scores
    return _probe(checkpoint, options, reach, device, scores, judge, count, report)


def _probe(
    checkpoint: Checkpoint,
    options: ImportanceOptions,
    reach: Sequence[Tensor],
    device: str,
    scores: list[LayerScore],
    judge: _Judge,
    count: int,
    report: Progress,
) -> list[LayerScore]:
    """Ranks the first `count` anew."""

    def seeded(index: int, attention: GroupedQueryAttention) -> nn.Module:
        return seeded_mixer(attention, reach[index].float().to(device))

    # What is never a candidate needs no mixer.
    candidates = [score.layer for score in scores[: count + WIDER * options.batch]]
    hybrid = HybridModel(checkpoint.load_transformers(torch.float32, device), candidates, seeded)
    _align(checkpoint, options, hybrid, report)
    chosen: list[LayerScore] = []
    number = 0
    while len(chosen) < count:
        number += 1
        size = min(options.batch, count - len(chosen))
        before = {score.layer for score in chosen}
        tried = []
        for i, score in enumerate(scores[: WIDER * size]):
            report(f"probing, round {number}", i, len(scores[: WIDER * size]))
            damage = sum(judge(hybrid, before | {score.layer}))
            tried.append(replace(score, probe=damage, round=number))
        report(f"probing, round {number}", len(tried), len(tried))
        tried.sort(key=lambda score: score.probe or 0.0)
        chosen += tried[:size]
        again = [replace(score, round=None) for score in tried[size:]]
        scores = again + scores[WIDER * size :]
    return chosen + scores


def reaches(
    checkpoint: Checkpoint, options: ImportanceOptions, report: Progress = silent
) -> list[Tensor]:
    """How far the heads of all layers look back, from the model's statistics.

    Raises:
        UnsupportedModelError: See :func:`rank_layers`.
    """
    _check_family(checkpoint)
    found = statistics.collect(
        checkpoint,
        StatisticsOptions(data=options.data, tokens=options.tokens, seed=options.seed),
        report,
    )
    return [found.layer(index).reach for index in range(len(found))]


def _check_family(checkpoint: Checkpoint) -> None:
    family = checkpoint.config.get("model_type")
    if family not in PLAIN:
        raise UnsupportedModelError(
            f"{checkpoint.source} is of type '{family}': layers are ranked whose attention can be "
            f"replaced, of {', '.join(PLAIN)}"
        )


def _align(
    checkpoint: Checkpoint, options: ImportanceOptions, hybrid: HybridModel, report: Progress
) -> None:
    """Read-outs in closed form, and mixers aligned for some steps."""
    tokenizer, window = checkpoint.tokenizer(), _window(checkpoint, hybrid.device.type)
    chat = StatisticsOptions.chat
    solve = calibration_text(options.data).windows(tokenizer, window, SOLVE, options.seed, chat)
    report("closed form", 0, 1)
    hybrid.seed_own_tokens(solve)
    hybrid.fit_outputs(solve)
    report("closed form", 1, 1)
    if not options.steps:
        return
    batch = 8 if hybrid.device.type == "cuda" else 1
    count = options.steps * batch * distill.processes()[1]
    learn = lessons(checkpoint, options.data, count, window, options.seed)
    distill.train(
        Alignment(hybrid, inherited=True),
        learn.split(batch).__getitem__,
        Training(options.steps, 3e-3, warmup=0.2, cooldown=0.7, floor=0.05, clip=1.0),
        None,
        report=lambda _, done, total: report("aligning", done, total),
    )
    hybrid.fit_outputs(solve)


def _window(checkpoint: Checkpoint, device: str) -> int:
    window = WINDOW_CUDA if torch.device(device).type == "cuda" else WINDOW
    return min(window, int(checkpoint.hf_config().max_position_embeddings))


def _texts(
    checkpoint: Checkpoint, options: ImportanceOptions, device: str
) -> list[tuple[Tensor, Tensor]]:
    """Token ids `[T]` and the positions that count: all of some texts, then answers of tasks.

    Where tasks do not fit into the model's context, there are none.
    """
    tokenizer, window = checkpoint.tokenizer(), _window(checkpoint, device)
    corpus = calibration_text(options.data)
    # From the end of the order in which read-outs see the text.
    plain = corpus.windows(tokenizer, window, TEXTS, options.seed + 1)
    texts = [(ids, torch.arange(window)) for ids in plain]
    haystack = corpus.excerpt(200_000)
    try:
        for i in range(TEXTS):
            kind = _KINDS[i % len(_KINDS)]
            task = RecallTask(tokenizer, haystack, kind, words=5, seed=options.seed + i)
            sample = task.sample(window)
            ids = torch.cat((sample.context, sample.tail))
            texts.append((ids, len(sample.context) + sample.answers - 1))
    except UsageError:
        return texts[:TEXTS]
    return texts
