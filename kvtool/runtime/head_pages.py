"""Pages of single heads, for plans with token budgets.

Where heads keep different numbers of tokens, a page that all of them share would be empty in most.
Here a page holds :data:`PAGE` tokens of one KV head of one layer, every head of a row has a list of
pages of its own, and all lists draw on one pool (as in KV-Compress, arXiv 2410.00161).

A head that keeps everything has the token at position p in place p of its list. One with a budget
has what it kept of the prompt in its first places, and behind it all tokens that came later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.kernels.append import append
from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.paged_split import PagedRings, PagedSplit
from kvtool.runtime.pages import Paged, Pages, Place, enlarge
from kvtool.runtime.selection import Selector
from kvtool.runtime.split import BudgetedHeads
from kvtool.runtime.stores import PAGE, KVHeads, Store, whole_pages


class HeadPages(Pages):
    """The pages of the heads of all layers, and what lies in them.

    Args:
        budgets: By layer, of each head that has pages: the tokens of a prompt that it keeps, or
            `None` for all.

    Attributes:
        layers: Which of the lists belong to which layer.
        planes: Keys and values, `[pages, 1, PAGE, D]`.
        prompts: By row, tokens of its prompt; `None` as long as it is not known.
        shift: `[rows, heads]` int64, on the device: the token at position p behind the prompt lies
            in place p + shift, which is min(budget, prompt) - prompt.
    """

    def __init__(
        self, rows: int, pages: int, most: int, budgets: Sequence[Sequence[int | None]],
        head_dim: int, like: Tensor,
    ) -> None:  # fmt: skip
        self.budgets = [budget for layer in budgets for budget in layer]
        super().__init__(rows, pages, most, like.device, len(self.budgets))
        ends = [0, *accumulate(map(len, budgets))]
        self.layers = [slice(*ends[i : i + 2]) for i in range(len(budgets))]
        shape = (self.count, 1, PAGE, head_dim)
        self.planes = {"keys": like.new_empty(shape), "values": like.new_empty(shape)}
        self.prompts: list[int | None] = [None] * self.rows
        self.shift = torch.zeros(self.table.shape[:2], dtype=torch.long, device=like.device)
        self._rooms = [0] * self.rows

    @property
    def page_bytes(self) -> int:
        """Of keys and values of a head."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    @property
    def table_bytes(self) -> int:
        return super().table_bytes + self.shift[0].nbytes

    def room(self, row: int) -> int:
        return self._rooms[row]

    def bytes_in(self, store: Paged, row: int) -> int:
        if not isinstance(store, PagedByHead):
            return 0  # of a layer with a sliding window, all of which lies in rings
        return sum(map(len, self.owned[row][store.lists])) * self.page_bytes

    def give_row(self, row: int) -> None:
        self.prompts[row] = None
        super().give_row(row)

    def begin(self, row: int, prompt: int) -> None:
        if prompt != self.prompts[row]:
            self.prompts[row] = prompt
            shifts = [0 if n is None else min(n, prompt) - prompt for n in self.budgets]
            self.shift[row] = torch.tensor(shifts).to(self.shift.device)

    def stored(self, tokens: int, prompt: int | None) -> list[int]:
        """Tokens that each head keeps of so many.

        Nothing is known of those of a budgeted head before its prompt is.
        """
        later = 0 if prompt is None else max(0, tokens - prompt)
        return [
            tokens if budget is None else min(budget, prompt or 0) + later
            for budget in self.budgets
        ]

    def wanted(self, row: int, tokens: int) -> list[int]:
        stored = self.stored(whole_pages(tokens), self.prompts[row])
        return [whole_pages(n) // PAGE for n in stored]

    def resize(self, row: int, tokens: int) -> int:
        missing = super().resize(row, tokens)
        if not missing:
            self._rooms[row] = whole_pages(tokens)
        return missing

    def grow(self, rows: int, pages: int) -> None:
        super().grow(rows, pages)
        enlarge(self.planes, self.count)
        if rows:
            self.prompts += [None] * rows
            self._rooms += [0] * rows
            self.shift = torch.cat((self.shift, self.shift.new_zeros((rows, self.shift.shape[1]))))

    def place(self, rows: Tensor, positions: Tensor) -> Place:
        """With `slots` and `lengths` `[B, heads]`; a layer looks its lists up by itself."""
        at = positions[:, None] + self.shift[rows]
        lists = torch.arange(at.shape[1], device=at.device)
        page = self.table[rows[:, None], lists, at // PAGE].long()
        return Place(rows, positions, self.table, page * PAGE + at % PAGE, (at + 1).int())

    def write(self, row: int, head: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Puts keys and values `[T, D]` in places of a list from `start` on."""
        at = torch.arange(start, start + len(keys), device=keys.device)
        page = self.table[row, head][at // PAGE].long()
        for plane, new in zip(self.planes.values(), (keys, values), strict=True):
            plane[page, 0, at % PAGE] = new

    def read(self, row: int, head: int, count: int) -> list[Tensor]:
        """The keys and the values in the first places of a list, `[count, D]` each."""
        page = self.table[row, head, : whole_pages(count) // PAGE].long()
        return [plane[page].flatten(0, 2)[:count] for plane in self.planes.values()]


class FullHeadsInPages(Store):
    """Heads that keep every token; see :class:`kvtool.runtime.split.FullHeads`.

    Args:
        lists: Theirs.
    """

    def __init__(self, heads: KVHeads, pages: HeadPages, lists: range) -> None:
        self.pages, self.lists, self.planes = pages, lists, pages.planes
        self.scaling, self.sink_logits = heads.scaling, heads.sink_logits

    @property
    def kv_heads(self) -> int:
        return len(self.lists)

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens of one row and returns what they read, `[1, Q, T, D]`."""
        assert step.row is not None
        parts = []
        for i, head in enumerate(self.lists):
            self.pages.write(step.row, head, step.starts[0], new.k[0, i], new.v[0, i])
            parts.append(self.pages.read(step.row, head, step.lengths[0]))
        keys, values = (torch.stack(x)[None] for x in zip(*parts, strict=True))
        return causal_attention(new.q, keys, values, self.scaling, sink_logits=self.sink_logits)


class BudgetedHeadsInPages(BudgetedHeads):
    """Heads that keep the best tokens of the prompt, and all that come later."""

    def __init__(
        self, heads: KVHeads, pages: HeadPages, lists: range, budgets: Sequence[int],
        new_selector: Callable[[], Selector],
    ) -> None:  # fmt: skip
        super().__init__(heads, 0, budgets, new_selector)
        self.pages, self.lists = pages, lists

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return length >= (self.pages.prompts[row] or 0)

    def add_later(self, new: NewTokens, step: Step) -> Tensor:
        assert step.row is not None
        row, contexts = step.row, []
        kept = self.pages.stored(step.starts[0], self.pages.prompts[row])
        count, heads = new.k.shape[2], len(self.lists)
        logits = [None] * heads if self.sink_logits is None else self.sink_logits.chunk(heads)
        for head, q, k, v, own in zip(
            self.lists, new.q.chunk(heads, 1), new.k[0], new.v[0], logits, strict=True
        ):
            self.pages.write(row, head, kept[head], k, v)
            keys, values = (x[None, None] for x in self.pages.read(row, head, kept[head] + count))
            contexts.append(causal_attention(q, keys, values, self.scaling, sink_logits=own))
        return torch.cat(contexts, dim=1)

    def keep(self, row: int, chosen: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        for head, columns, k, v in zip(self.lists, chosen, keys, values, strict=True):
            self.pages.write(row, head, 0, k[columns], v[columns])


class PagedByHead(PagedSplit):
    """A layer of heads in pages of their own, and streaming heads in rings.

    Args:
        sink_logits: Of all heads in pages.
    """

    full: FullHeadsInPages  # type: ignore[assignment]

    def __init__(
        self, pages: HeadPages, index: int, full: FullHeadsInPages,
        budgeted: BudgetedHeadsInPages | None, streaming: PagedRings | None,
        sink_logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(full, streaming, budgeted)  # type: ignore[arg-type]
        self.pages, self.lists = pages, pages.layers[index]
        self.sink_logits = sink_logits

    @property
    def page_bytes(self) -> int:
        """Pages belong to all layers."""
        return 0

    @property
    def row_bytes(self) -> int:
        """Of the streaming heads."""
        return self.streaming.row_bytes if self.streaming else 0

    def grow(self) -> None:
        """Takes as many rows as there are now."""
        if self.streaming:
            self.streaming.grow()

    def step_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Every head of a row is a row with one head here, and a table and a length of its own."""
        (rows, heads, width), queries = k.shape, q.shape[1]
        keys, values = self.pages.planes["keys"], self.pages.planes["values"]
        cos, sin = (x.repeat_interleave(heads, 0) for x in (cos, sin))
        q = q.reshape(rows * heads, queries // heads, width)
        k, v = (x.reshape(rows * heads, 1, width) for x in (k, v))
        table = self.pages.table[at.rows, self.lists].flatten(0, 1)
        slots, lengths = (x[:, self.lists].flatten().contiguous() for x in (at.slots, at.lengths))
        turned = append(k, v, cos, sin, keys, values, slots, q)
        assert turned is not None
        scaling, logits = self.full.scaling, None
        if self.sink_logits is not None:
            logits = self.sink_logits.expand(rows, queries).reshape(rows * heads, -1)
        context, _ = paged_decode_attention(
            turned, keys, values, lengths, scaling, table, sink_logits=logits
        )
        context = context.view(rows, queries, width)
        return context if out is None else out.copy_(context)
