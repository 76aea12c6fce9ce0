"""What heads have in common that may read a prompt densely, and drop most of it at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.stores import DenseStore, KVHeads, Seen, Store

if TYPE_CHECKING:
    from kvtool.runtime.split import StreamingHeads


class DroppingHeads(Store):
    """Heads that may read a prompt as full heads do, and drop most of it at its end.

    Attributes:
        dense_prompt: Whether they do.
        exact: A ring of what is kept as it was, where the planes hold tokens in another form.
    """

    exact: StreamingHeads | None = None
    prompt: DenseStore | None = None
    prompt_row: int | None = None

    def __init__(self, heads: KVHeads, dense_prompt: bool) -> None:
        self.heads, self.dense_prompt = heads, dense_prompt
        self.scaling, self.sink_logits = heads.scaling, heads.sink_logits

    @property
    def allocated_bytes(self) -> int:
        beside = (store.allocated_bytes for store in (self.exact, self.prompt) if store)
        return super().allocated_bytes + sum(beside)

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return self.exact is None or self.exact.can_crop(row, stored, length)

    def keep_prefix(self, capacity: int) -> None:
        super().keep_prefix(capacity)
        if self.exact:
            self.exact.keep_prefix(capacity)

    def snapshot(self, row: int) -> list[Tensor]:
        return self.exact.snapshot(row) if self.exact else []

    def restore(self, row: int, saved: list[Tensor]) -> None:
        if self.exact:
            self.exact.restore(row, saved)

    def read_prompt(self, new: NewTokens, step: Step) -> Tensor:
        """Attention among the tokens of a prompt, all of which are held until its last piece."""
        assert step.row is not None
        assert step.prompt is not None
        if step.starts[0] == 0:
            self.prompt = DenseStore(self.heads, 1, step.prompt)
            self.prompt_row = step.row
        assert self.prompt is not None
        self.prompt.write(0, step.starts, {"keys": new.k, "values": new.v})
        context = self.prompt.attend(new.q, 0, step.lengths)
        self.watch_prompt(new.q[0], step.starts[0])
        if step.lengths[0] == step.prompt:
            planes = self.prompt.planes
            self.end_prompt(step.row, planes["keys"][0], planes["values"][0])
            self.prompt = None
        return context

    def seen_by(self, new: NewTokens, step: Step) -> Seen | None:
        if step.prompt is None or not self.dense_prompt:
            return self.seen_later(new, step)
        if step.starts[0] == 0:
            return new.k, new.v
        assert self.prompt is not None
        keys, values = (self.prompt.planes[part] for part in ("keys", "values"))
        return keys[:, :, : step.lengths[0]], values[:, :, : step.lengths[0]]

    def lend(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        if step.prompt is None or not self.dense_prompt:
            return self.lend_later(q, step, seen)
        assert seen is not None
        return causal_attention(q, *seen, self.scaling, sink_logits=self.sink_logits)

    def seen_later(self, new: NewTokens, step: Step) -> Seen | None:
        """The same as :meth:`seen_by` behind a prompt that is read densely."""
        raise NotImplementedError  # pragma: no cover

    def lend_later(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        """The same as :meth:`lend` there."""
        raise NotImplementedError  # pragma: no cover

    def forget(self, row: int) -> None:
        if self.prompt_row == row:
            self.prompt = None

    def watch_prompt(self, q: Tensor, start: int) -> None:
        """Told the queries `[Q, T, D]` of a piece, when its keys are in `prompt`."""

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Keeps what is worth keeping of a whole prompt `[H, n, D]`, which `prompt` holds."""
        raise NotImplementedError  # pragma: no cover
