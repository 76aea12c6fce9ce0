"""One pass over calibration text: it measures everything that the closed-form methods read.

The pass goes through a checkpoint layer by layer, each layer with its own exact attention. Hidden
states lie in a memory-mapped file and finished layers in files of their own, so memory is bounded
by the largest layer, and a killed run goes on behind the last layer it finished, with the same
bits. The result is cached under `$KVTOOL_HOME/statistics`, by the content of weights and text, so
that the second method on a model starts at once.

Sums are float64 of float64 products: a rank is read off eigenvalues down to 1e-12 of the largest,
which sums over float32 would bury.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvtool import __version__
from kvtool._home import home
from kvtool.calibrate.layer_sums import LayerSums, Seen, shapes, watched
from kvtool.calibrate.statistics_file import FORMAT, Statistics, join
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint, check_disk
from kvtool.corpus import Corpus, calibration_text, can_chat
from kvtool.errors import UsageError
from kvtool.layout import AttentionLayout
from kvtool.progress import Progress, silent

WINDOW = 2048
"""Tokens per window, if the model's context allows."""
CONTEXT = 8192
"""Positions that windows are shifted to, if the model's context allows."""

_BATCH = 2048  # tokens that go through a layer together
_NAME = "statistics.safetensors"


@dataclass(frozen=True)
class StatisticsOptions:
    """Everything that determines statistics besides the model.

    Attributes:
        data: Calibration text; `None` is Python's own documentation.
        tokens: Calibration tokens; a last part of a window is left out.
        window: Tokens per window; `None` is 2048 or the model's context.
        context: Each window starts at a random position such that it ends within `context`;
            `None` is 8192 or the model's context. `context == window` starts all at 0.
        sinks: First positions of each window, kept apart.
        chat: Share of the windows that are conversations in the model's chat template; 0 is used
            where there is none.
        seed: Fixes the order of the text and the starts.
    """

    data: str | None = None
    tokens: int = 16384
    window: int | None = None
    context: int | None = None
    sinks: int = 4
    chat: float = 0.25
    seed: int = 0


def collect(
    checkpoint: Checkpoint,
    options: StatisticsOptions | None = None,
    report: Progress = silent,
    resume: bool = True,
) -> Statistics:
    """Statistics of the layers that have keys and values, from the cache if they are there.

    Args:
        report: Progress, by layers.
        resume: Use what an earlier run with the same model, text and options left, finished or
            not. Otherwise everything is measured anew.

    Raises:
        UsageError: The text is too short, or the window, context or sinks do not fit.
        CalibrationError: A layer gives values that are not finite.
        KvtoolError: See :class:`LayerStream`; also a full disk (predicted).
    """
    pass_ = _Pass(checkpoint, options or StatisticsOptions())
    with _locked(pass_.folder):
        if not resume:
            for path in (pass_.scratch, pass_.file):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not pass_.file.is_file():
            pass_.run(report)
    return Statistics.open(pass_.file)


def plan(checkpoint: Checkpoint, options: StatisticsOptions | None = None) -> dict[str, Any]:
    """What `collect` would do; nothing is written.

    Returns:
        `file`, whether it is `reused`, `tokens`, `windows`, `window`, `context`, `sinks`, `chat`,
        `bytes` of the file, `disk_bytes` and `memory_bytes` needed.

    Raises:
        KvtoolError: As `collect`, as far as it can be known before.
    """
    pass_ = _Pass(checkpoint, options or StatisticsOptions())
    used = pass_.options
    return {
        "file": str(pass_.file),
        "reused": pass_.file.is_file(),
        "tokens": used.tokens,
        "windows": len(pass_.ids),
        "window": used.window,
        "context": used.context,
        "sinks": used.sinks,
        "chat": used.chat,
        "bytes": file_bytes(pass_.stream),
        "disk_bytes": pass_.disk_bytes,
        "memory_bytes": memory_bytes(pass_.stream, used.tokens),
    }


def file_bytes(stream: LayerStream) -> int:
    """Size of a statistics file, but for the little that depends on the options."""
    return sum(map(_sums_bytes, stream.layouts))


def _sums_bytes(layout: AttentionLayout) -> int:
    """Of one layer; one without keys and values of its own has none."""
    if layout.kind == "state" or layout.reads is not None:
        return 0
    width = {kind: (g, w) for kind, (g, w) in shapes(layout).items()}
    squares = [*width.values(), width["joint"], width["joint"]]  # sinks', attended
    second = sum(8 * g * w * (w + 1) // 2 for g, w in squares)
    return second + sum(2 * 12 * g * w for g, w in width.values())


def memory_bytes(stream: LayerStream, tokens: int) -> int:
    """About what a pass over `tokens` tokens holds at once, besides Python and its libraries."""
    states = 2 * 4 * tokens * stream.columns.width
    embedding = stream.checkpoint.tensors["model.embed_tokens.weight"].nbytes
    # What goes through a layer takes about as much as it does on disk.
    passing = stream.checkpoint.largest_layer(len(stream))
    sums = 3 * max(map(_sums_bytes, stream.layouts))
    return states + max(embedding, layer_memory(stream) + passing + sums)


def layer_memory(stream: LayerStream) -> int:
    """About what the largest layer takes while it is read: as stored, and in fp32; experts twice
    more while they are put together, 6.3 times what is stored in all.
    """
    experts = any(re.search(r"\.experts\.\d", name) for name in stream.checkpoint.tensors)
    return (7 if experts else 3) * stream.checkpoint.largest_layer(len(stream))


class _Pass:
    """One streaming pass: what it reads, where it writes."""

    def __init__(self, checkpoint: Checkpoint, options: StatisticsOptions) -> None:
        self.checkpoint = checkpoint
        self.stream = LayerStream(checkpoint)
        resolved = _resolved(options, int(self.stream.config.max_position_embeddings))
        tokenizer = checkpoint.tokenizer()
        chat = resolved.chat if can_chat(tokenizer) else 0.0
        self.options = dataclasses.replace(resolved, chat=chat)
        self.corpus: Corpus = calibration_text(options.data)
        window, context, seed = self.options.window, self.options.context, self.options.seed
        assert window is not None
        assert context is not None
        count = self.options.tokens // window
        self.ids = self.corpus.windows(tokenizer, window, count, seed, chat)
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, context - window + 1, (count,), generator=generator)
        self.budgets = _budgets(window)
        self.folder = _home() / self._key()
        self.file, self.scratch = self.folder / _NAME, self.folder / "unfinished"

    def _key(self) -> str:
        known = [self._metadata, self.checkpoint.stamps()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        import transformers

        # The text is known by its content; where it lay does not matter.
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if k != "data"}
        return {
            "statistics": FORMAT,
            "fingerprint": self.checkpoint.fingerprint(),
            "options": options,
            "corpus": self.corpus.id,
            "windows": len(self.ids),
            "layers": len(self.stream),
            "budgets": self.budgets,
            "versions": {
                "kvtool": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    @property
    def disk_bytes(self) -> int:
        """Needed at the same time: all layers twice while they are joined, and hidden states."""
        states = 2 * 4 * self.ids.numel() * self.stream.columns.width
        return 2 * file_bytes(self.stream) + states

    def _layer_file(self, index: int) -> Path:
        return self.scratch / f"layer-{index:05d}.safetensors"

    def _hidden(self, index: int) -> Path:
        """Where the states `[N, T, width]` that go into a layer lie, float32."""
        return self.scratch / f"hidden-{index:05d}"

    def _map(self, file: Path) -> Tensor:
        shape = (*self.ids.shape, self.stream.columns.width)
        size = shape[0] * shape[1] * shape[2]
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)

    def run(self, report: Progress) -> None:
        """Measures every layer that is not there yet, and joins them."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in self.scratch.iterdir())
        check_disk(self.folder, max(0, self.disk_bytes - there))
        total = len(self.stream)
        first = sum(self._layer_file(i).is_file() for i in range(total))
        unfinished = self.scratch / "hidden.unfinished"
        if not first:
            self._map(unfinished).copy_(self.stream.embed(self.ids))
            unfinished.replace(self._hidden(0))
        report("measuring", first, total)
        for index in range(first, total):
            # A layer works in place; until it is through, a resumed run needs what went in.
            shutil.copyfile(self._hidden(index), unfinished)
            tensors = self._measure(self.stream.layer(index), self._map(unfinished))
            unfinished.replace(self._hidden(index + 1))
            _save(tensors, self._layer_file(index))
            self._hidden(index).unlink()
            report("measuring", index + 1, total)
        layers = {f"layers.{i}.": self._layer_file(i) for i in range(total)}
        whole = self.folder / "joined.unfinished"
        join(layers, whole, {"kvtool": json.dumps(self._metadata, sort_keys=True)})
        whole.replace(self.file)
        shutil.rmtree(self.scratch)

    def _measure(self, layer: StreamedLayer, hidden: Tensor) -> dict[str, Tensor]:
        """Takes `hidden [N, T, width]` through a layer, in place; returns what it leaves."""
        batch = max(1, _BATCH // hidden.shape[1])
        if layer.mixer is not None:  # which has no keys, and nothing to be measured
            layer.run(hidden, layer.mixer, batch)
            return {}
        if layer.attention.layout.reads is not None:
            layer.run(hidden, self.stream.exact_attention(layer), batch)
            return {}
        sums = LayerSums(layer.attention.layout, self.options.sinks, self.budgets)
        for piece, starts in zip(hidden.split(batch), self.starts.split(batch), strict=True):
            seen: list[Seen] = []
            # Added after the layer is through, which refuses values that are not finite.
            layer.run(piece, watched(self.stream, layer, starts, seen), batch)
            sums.add(layer, seen[0])
        return sums.tensors()


def _resolved(options: StatisticsOptions, limit: int) -> StatisticsOptions:
    """The options with the defaults that depend on the model, whose context is `limit`."""
    window = min(WINDOW, limit) if options.window is None else options.window
    context = max(window, min(CONTEXT, limit)) if options.context is None else options.context
    if context > limit:
        given = f"--window {window}" if options.context is None else f"--context {context}"
        raise UsageError(f"{given} is more than the {limit} positions of the model")
    if window > context:
        raise UsageError(f"--window {window} is longer than the context of {context}")
    if not 0 <= options.sinks < window:
        raise UsageError(f"--sinks {options.sinks} leaves nothing of a window of {window}")
    if not 0 <= options.chat <= 1:
        raise UsageError(f"--chat-share {options.chat} is not a share between 0 and 1")
    if options.tokens < window:
        raise UsageError(f"--tokens {options.tokens} is less than one window of {window}")
    tokens = options.tokens // window * window
    return dataclasses.replace(options, tokens=tokens, window=window, context=context)


def _budgets(window: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to the window."""
    steps = {max(1, 2**i * part // 2) for i in range(window.bit_length()) for part in (2, 3)}
    return [*sorted(n for n in steps if n < window), window]


def _home() -> Path:
    return home() / "statistics"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time work in a folder; the lock goes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}.",
            hint="KVTOOL_HOME names the folder that kvtool keeps its cache in",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    unfinished = file.with_suffix(".unfinished")
    save_file({name: x.contiguous() for name, x in sorted(tensors.items())}, unfinished)
    unfinished.replace(file)
