"""What models and codes are trained on: text, conversations and recall tasks.

Text alone does not teach a cache to be searched, so a quarter of the windows are recall tasks.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate.tasks import Kind, RecallTask
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import Corpus, training_text
from kvtool.errors import UsageError

RECALL = 0.25
"""Share of the windows that are recall tasks."""
CHAT = 0.25
"""Share of the others that are conversations, see :meth:`Corpus.windows`."""


def lessons(checkpoint: Checkpoint, data: str | None, count: int, length: int, seed: int) -> Tensor:
    """Windows `[count, length]` of training text, conversations and recall tasks, mixed evenly.

    Text that is too short is read again, its documents in another order. Where recall tasks do not
    fit into the length, there are none.
    """
    tokenizer, corpus = checkpoint.tokenizer(), training_text(data)
    tasks = _recall_tasks(tokenizer, corpus, seed)
    share = RECALL
    try:
        for task in tasks:
            trial = copy.copy(task)
            trial.random = random.Random(seed)
            trial.sample(length - 32)  # some samples need a little more than others
    except UsageError:
        share = 0.0
    recalled = [int(share * (i + 1)) > int(share * i) for i in range(count)]
    wanted = count - sum(recalled)
    text: list[Tensor] = []
    there = corpus.count_tokens(tokenizer, 2 * wanted * length)
    epoch, once = 0, max(1, int(0.9 * there) // length)
    while len(text) < wanted:
        more = min(once, wanted - len(text))
        try:
            text += corpus.windows(tokenizer, length, more, seed + epoch, CHAT).unbind()
        except UsageError:
            if once == 1:
                raise
            once //= 2  # conversations do not fill their windows to the last token
        else:
            epoch += 1
    rows = iter(text)
    drawn = 0
    windows = []
    for recall in recalled:
        if recall:
            sample = tasks[drawn % len(tasks)].sample(length)
            windows.append(torch.cat((sample.context, sample.tail))[:length])
            drawn += 1
        else:
            windows.append(next(rows))
    return torch.stack(windows)


_HAYSTACK = 400_000  # characters that recall tasks hide their keys in


def _recall_tasks(tokenizer: Any, corpus: Corpus, seed: int) -> list[RecallTask]:
    kinds: tuple[Kind, ...] = ("names", "ordinals")
    haystack = corpus.excerpt(_HAYSTACK)
    return [RecallTask(tokenizer, haystack, kind, words=5, seed=seed) for kind in kinds]
