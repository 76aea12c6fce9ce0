"""How many bytes one sequence takes, known before they are allocated."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Sequence

from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan
from kvtool.runtime.engine import Engine
from kvtool.runtime.stores import PAGE, whole_pages
from kvtool.windows import WindowPlan


class RowMemory:
    """Bytes of a cache of one row, as its stores allocate them.

    What grows with the length is measured from two empty caches. What a plan packs, what it holds
    only while it reads a prompt, and what its token budgets keep of it, follows from the plan.
    """

    def __init__(self, engine: Engine) -> None:
        self.layers: Sequence[LayerPlan] = () if engine.plan is None else engine.plan.layers
        self.paged = engine.paged  # a page has room for the blocks of its tokens
        self.latents = [x.kept for x in self.layers if isinstance(x.kept, LatentPlan)]
        self.head_dim = 0 if engine.plan is None else engine.plan.base.head_dim
        self.itemsize = engine.dtype.itemsize
        windows = (attention.window for attention in engine.attentions)
        self.windows: list[WindowPlan] = [x for x in windows if x is not None]
        self.least, large = (
            engine.new_cache(1, n).allocated_bytes - self._uneven(n) for n in (PAGE, 2 * PAGE)
        )
        self.page_bytes = large - self.least
        self.constant = self.least - self.page_bytes
        self.head_bytes = 0  # of keys and values of one token
        self.held = 0  # bytes of latents of a token of a prompt, while that is read
        self.dropping = 0  # heads that hold a whole prompt while it is read
        self.watched = 0  # and the attention that its tokens get
        self.budgets: list[int] = []
        self.rings: list[int] = []  # tokens that each streaming head has room for
        self.heads, self.dense = 1, True
        plan = engine.plan
        if plan is None:
            return
        self.heads, self.dense = max(1, plan.planned_heads), plan.prefill == "dense"
        self.head_bytes = 2 * self.head_dim * self.itemsize
        if self.dense:
            self.held = self.itemsize * sum(x.width for x in self.latents)
        for layer in plan.layers:
            self.budgets += [n for n in layer.budgets if n is not None]
            self.rings += [layer.sink + layer.window] * sum(layer.streaming)
            if self.dense:
                self.dropping += len(layer.streaming) if plan.codes else sum(layer.streaming)
                if layer.packed:
                    self.dropping += len(layer.full_heads)
                if layer.bits is not None and layer.bits.rest:
                    self.watched += len(layer.full_heads)
        self.dropping += len(self.budgets)

    @property
    def bytes_per_token(self) -> float:
        """What a further token costs, once a prompt is read."""
        packed = 0.0
        if not self.paged:
            packed = sum(
                len(layer.full_heads) * float(layer.bits.token_bytes(self.head_dim))
                for layer in self.layers
                if layer.bits is not None
            )
            packed += sum(float(latent.token_bytes(self.itemsize)) for latent in self.latents)
        return self.page_bytes / PAGE + packed + len(self.budgets) * self.head_bytes

    @property
    def constant_bytes(self) -> int:
        """What a sequence of any length takes besides, with full sliding windows."""
        if self.paged:
            return self.constant
        return self.constant + sum(x.cache_bytes(x.window, self.itemsize) for x in self.windows)

    def reading(self, prompt: int) -> int:
        """While a prompt of so many tokens is read."""
        held = self.dropping * self.head_bytes + self.held + 4 * self.watched
        # On pages, room for what is kept of the prompt is there before it is read.
        there = self.holding(prompt, prompt) if self.paged else self._planes(prompt)
        return there + held * prompt

    def holding(self, tokens: int, prompt: int) -> int:
        """With `tokens` stored, of which the first `prompt` were the prompt."""
        return self._planes(tokens) + self.head_bytes * self._budgeted(tokens, prompt)

    def most_tokens(self, budget: int, prompt: int, limit: int) -> int:
        """Tokens, up to `limit`, that a sequence can come to within a byte budget; 0 for none."""
        if self.reading(prompt) > budget:
            return 0
        lengths = range(prompt, limit + 1)
        fitting = bisect_right(lengths, budget, key=lambda n: self.holding(n, prompt))
        return prompt + fitting - 1 if fitting else 0

    def dropped(self, tokens: int, prompt: int) -> float:
        """Tokens that a plan has dropped of so many that came, mean over heads."""
        read = tokens >= prompt
        dropped = sum(max(0, tokens - room) for room in self.rings) if read or not self.dense else 0
        if read:
            dropped += sum(max(0, prompt - budget) for budget in self.budgets)
        return dropped / self.heads

    def unread(self, tokens: int) -> int:
        """Of `tokens` that are stored, what a step does not read."""
        return sum(x.unread_bytes(tokens, self.head_dim, self.itemsize) for x in self.layers)

    def _budgeted(self, tokens: int, prompt: int) -> int:
        """Tokens that budgeted heads have room for: what they keep of the prompt, and all later
        ones behind it, in planes of their own or in the same pages.
        """
        kept = [min(budget, prompt) for budget in self.budgets]
        if self.paged:
            later = max(0, whole_pages(tokens) - prompt)
            return sum(whole_pages(n + later) for n in kept)
        return sum(kept) + len(kept) * whole_pages(tokens - prompt)

    def _planes(self, tokens: int) -> int:
        room = whole_pages(tokens)
        exact = max(self.least, self.constant + self.page_bytes * (room // PAGE))
        return exact + self._uneven(room)

    def _uneven(self, room: int) -> int:
        """What does not grow in step with the room for so many tokens: blocks of heads and of
        latents with few bits, sliding windows; 0 on pages, which hold them or have rings.
        """
        if self.paged:
            return 0
        heads = sum(
            len(layer.full_heads) * layer.bits.blocks(room) * layer.bits.block_bytes(self.head_dim)
            for layer in self.layers
            if layer.bits is not None
        )
        latents = sum(x.blocks(room) * x.block_bytes() for x in self.latents)
        windows = sum(x.cache_bytes(room, self.itemsize) for x in self.windows)
        return heads + latents + windows


def give_back() -> None:
    """Returns freed memory to the system, which the C library of Linux keeps for later."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
