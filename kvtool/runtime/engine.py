"""Prefill, decode and sampling over the stores."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError, UsageError
from kvtool.factors import embedding_factor, finish_of, layer_inputs
from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.linear import LEAST_ROWS
from kvtool.kernels.native import use_native
from kvtool.latent import FactoredAttention
from kvtool.layout import decoder_layers
from kvtool.plan import Plan
from kvtool.rope import Rope
from kvtool.runtime.cache import KVCache
from kvtool.runtime.graphs import PagedCache, PagedMemory
from kvtool.runtime.head_pages import HeadPages
from kvtool.runtime.host import load_host
from kvtool.runtime.layers import DecodeLinear, Step, through
from kvtool.runtime.pages import Pages
from kvtool.runtime.recurrent import RuntimeMixer
from kvtool.runtime.sampling import GREEDY, Sampler, Sampling, draw
from kvtool.runtime.shared import SharedAttention
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import PAGE, Rows, whole_pages
from kvtool.runtime.windowed import WindowedAttention


class Engine:
    """A checkpoint, ready to run from its own cache.

    Attributes:
        plan: What its caches keep; None for everything.
        max_context: Positions that the model was made for.
        eos_ids: Tokens that end a text.
        paged: Whether caches share pages at fixed addresses: where Triton's kernels run, and all
            layers have such stores.
        memory: What all caches share; each has its own pages if there is none.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, attentions: list[Any], plan: Plan | None = None
    ) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.model = model
        self.attentions = attentions
        self.config = model.config
        self.tokenizer = checkpoint.tokenizer()
        self.max_context = int(self.config.max_position_embeddings)
        self.vocab_size = int(self.config.vocab_size)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        known = range(self.vocab_size)  # others are never drawn, nor is there a score to forbid
        self.eos_ids = {x for x in _eos_ids(model, self.tokenizer) if x in known}
        self._embedding_factor = embedding_factor(self.config)
        self._finish = finish_of(self.config)
        limits = [x.most_tokens for x in attentions if x.most_tokens is not None]
        self._most_tokens = min(limits, default=sys.maxsize)
        stores = [i for i, x in enumerate(attentions) if not isinstance(x, SharedAttention)]
        self._storing = stores[-1] + 1  # behind the last layer that stores something
        self._ropes: list[Rope] = []
        for attention in attentions:
            attention.table = self._table_of(attention.rope)
        self.paged = self._has_paged_stores()
        self.memory: PagedMemory | None = None
        self.take_device()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        plan: Plan | None = None,
    ) -> Engine:
        """Loads a checkpoint.

        Args:
            plan: What its layers keep; everything if not given.

        Raises:
            UnsupportedModelError: The attention is not one that kvtool knows, or not one that the
                plan can be applied to.
            CheckpointError: The weights do not fit the config.
            PlanError: The plan belongs to another model.
        """
        model, attentions = load_host(checkpoint, dtype, device, plan)
        return cls(checkpoint, model, attentions, plan)

    def take_device(self) -> None:
        """Makes its device the calling thread's: kernels and CUDA graphs run on the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `batch_size` rows with room for `capacity` tokens each.

        Where there is a shared memory, it takes part of that.
        """
        if self.paged:
            memory = self.memory
            if memory is None:
                pages = batch_size * sum(self.new_pages(0, 0).wanted(0, capacity))
                memory = PagedMemory(self, batch_size, pages)
            return memory.new_cache(batch_size, capacity)
        stores = [attention.new_store(batch_size, capacity) for attention in self.attentions]
        return KVCache(stores, batch_size)

    @torch.inference_mode()
    def extend(
        self,
        cache: KVCache,
        ids: Tensor,
        row: int = 0,
        *,
        all_logits: bool = False,
        every: int = 1,
        chunk: int = 8192,
        prompt: int | None = None,
    ) -> Tensor:
        """Feeds `ids [T]` behind what a row already holds: a prompt, a later turn, a true text.

        What an empty row is fed is its prompt, at whose end a plan drops tokens. Everything later
        gives what it would give if it were decoded token by token.

        Args:
            all_logits: Return the logits after every token, not only after the last.
            every: With `all_logits`, one token in so many, the first of them on.
            chunk: Tokens per pass through the model; bounds the memory of activations.
            prompt: Tokens of the prompt that `ids` is a piece of, where it comes in several calls.

        Returns:
            `[V]`, or with `all_logits` `[T, V]` (T / `every`, rounded up), fp32.

        Raises:
            UsageError: The row would outgrow the model's context.
        """
        begin, total = cache.lengths[row], cache.lengths[row] + len(ids)
        self._check_length(total)
        if prompt is None and begin == 0:
            prompt = total
        if prompt is not None:
            cache.begin(row, prompt)
        cache.reserve([total if r == row else n for r, n in enumerate(cache.lengths)])
        # A layer may drop what the row would need to go back, so until all layers are through, an
        # interrupted row holds nothing.
        intact = all(store.can_crop(cache.place_of(row), total, begin) for store in cache.stores)
        cache.lengths[row] = begin if intact else 0
        collected: list[Tensor] = []
        start = begin
        dense = prompt is not None and self.plan is not None and self.plan.prefill == "dense"
        for piece in ids.to(self.device).split(chunk if dense else min(chunk, self._most_tokens)):
            end = start + len(piece)
            positions = torch.arange(start, end, device=self.device)[None]
            place, tables = cache.place_of(row), self.tables(positions)
            step = Step(cache.stores, place, [start], [end], prompt, tables, positions=positions)
            hidden = self.run(step, piece[None], only_last=not all_logits)
            if all_logits:
                collected.append(self.logits(hidden[:, (begin - start) % every :: every])[0])
            start = end
        cache.lengths[row] = total
        if all_logits:
            return torch.cat(collected)
        return self.logits(hidden[:, -1:])[0, 0]

    @torch.inference_mode()
    def decode(self, cache: KVCache, ids: Tensor) -> Tensor:
        """One token `ids [B]` for every row; returns the logits after it, `[B, V]` fp32."""
        starts = list(cache.lengths)
        lengths = [n + 1 for n in starts]
        self._check_length(max(lengths))
        cache.reserve(lengths)
        if isinstance(cache, PagedCache):
            logits = cache.memory.decode(cache.rows, starts, ids)
            cache.lengths = lengths
            return logits
        positions = torch.tensor(starts, device=self.device)[:, None]
        tables = self.tables(positions)
        step = Step(cache.stores, None, starts, lengths, None, tables, positions=positions)
        hidden = self.run(step, ids.to(self.device)[:, None])
        cache.lengths = lengths
        return self.logits(hidden)[:, 0]

    @torch.inference_mode()
    def decode_rows(self, caches: Sequence[KVCache], ids: Sequence[int]) -> Tensor:
        """One token for each of several caches of one row; returns the logits `[B, V]` after it.

        Linear layers see all rows together, attention each by itself. From contiguous stores, with
        packed weights and in float32, the logits of a row do not depend on the others.
        """
        starts = [cache.lengths[0] for cache in caches]
        lengths = [n + 1 for n in starts]
        self._check_length(max(lengths))
        for cache, n in zip(caches, lengths, strict=True):
            cache.reserve([n])
        if isinstance(caches[0], PagedCache):
            memory = caches[0].memory
            if any(getattr(cache, "memory", None) is not memory for cache in caches):
                raise ValueError("caches that are decoded together share one memory")
            rows = [cache.place_of(0) for cache in caches]
            logits = memory.decode(rows, starts, torch.tensor(ids))
            for cache, n in zip(caches, lengths, strict=True):
                cache.lengths = [n]
            return logits
        spare = max(0, LEAST_ROWS - len(ids))
        fed = torch.tensor([*ids, *[0] * spare], device=self.device)
        positions = torch.tensor([*starts, *[0] * spare], device=self.device)[:, None]
        layers = zip(*(cache.stores for cache in caches), strict=True)
        stores, tables = [Rows(layer) for layer in layers], self.tables(positions)
        step = Step(stores, None, starts, lengths, None, tables, positions=positions)
        hidden = self.run(step, fed[:, None])
        for cache, n in zip(caches, lengths, strict=True):
            cache.lengths = [n]
        return self.logits(hidden)[: len(ids), 0]

    def open_memory(self, nbytes: int, rows: int) -> PagedMemory:
        """Lets all caches share so many bytes, with room for as many rows at first.

        Only for a paged engine.
        """
        self.memory = None  # before another takes its place
        probe = PagedMemory(self, 0, 0)
        lists = probe.pages.table.shape[1]
        pages = most = rows * lists * whole_pages(self.max_context) // PAGE
        if probe.page_bytes:
            pages = min(most, (nbytes - probe.fixed_bytes(rows)) // probe.page_bytes)
        pages = max(0, pages)
        self.memory = PagedMemory(self, rows, pages)
        return self.memory

    def new_pages(self, rows: int, pages: int) -> Pages:
        """So many pages for so many rows; of single heads if the plan has token budgets."""
        most = whole_pages(self.max_context) // PAGE
        kinds = SplitAttention | WindowedAttention | RuntimeMixer
        by_head = [isinstance(x, kinds) for x in self.attentions]
        if self.plan is None or self.plan.policy is None or not all(by_head):
            return Pages(rows, pages, most, self.device)
        budgets = [getattr(attention, "paged_budgets", []) for attention in self.attentions]
        stages = next(x.stages for x in self.attentions if isinstance(x, SplitAttention))
        like, head_dim = stages.qkv.weight, stages.layout.head_dim
        return HeadPages(rows, pages, most, budgets, head_dim, like)

    def pack(self) -> None:
        """Puts the weights into the order in which the CPU reads them for few rows, for good."""
        DecodeLinear.pack_in(self.model)
        for attention in self.attentions:
            if isinstance(attention.stages, FactoredAttention):
                attention.stages.pack()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        ignore_eos: bool = False,
        cache: KVCache | None = None,
    ) -> Iterator[list[int | None]]:
        """Continues several prompts; yields one token per prompt and step, `None` once finished.

        Args:
            prompts: Token ids. A row of `cache` that already holds the head of its prompt is
                continued from there.
            max_new_tokens: Tokens to draw per prompt.
            seed: Same seed and same batch give the same text.
            ignore_eos: Go on after a stop token.
            cache: Kept by the caller for later turns; made here if not given.

        Raises:
            CheckpointError: The logits after a prompt are NaN.
        """
        longest = max(len(prompt) for prompt in prompts)
        self._check_length(longest + max_new_tokens)
        if cache is None:
            cache = self.new_cache(len(prompts), longest + max_new_tokens)
        texts = [list(prompt) for prompt in prompts]
        # A generator per row, so that rows do not disturb each other.
        samplers = [
            Sampler(sampling, None if seed is None else seed + row, self.device, prompt=len(text))
            for row, text in enumerate(texts)
        ]
        for row, text in enumerate(texts):
            cache.crop(row, len(text) - 1)  # the last token's logits are needed again
        logits = torch.stack(
            [
                self.extend(cache, torch.tensor(text[cache.lengths[row] :]), row)
                for row, text in enumerate(texts)
            ]
        )
        if bool(logits.isnan().any()):  # not in every step, which would wait for the device
            raise CheckpointError(
                f"{self.checkpoint.source} gives no numbers for the prompt: its logits are NaN",
                hint="float16 overflows easily: --dtype float32"
                if self.dtype == torch.float16
                else None,
            )
        running = [True] * len(texts)
        for step in range(max_new_tokens):
            drawn = draw(samplers, logits, [(text,) for text in texts])
            yield [t if on else None for t, on in zip(drawn, running, strict=True)]
            for row, token in enumerate(drawn):
                texts[row].append(token)
                running[row] &= ignore_eos or token not in self.eos_ids
            if step + 1 == max_new_tokens or not any(running):
                return
            logits = self.decode(cache, torch.tensor(drawn))

    def tables(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cos and sin at `positions [B, T]`, `[B, T, d]` each, per distinct RoPE of the model."""
        tables = [rope.tables(positions) for rope in self._ropes]
        return [(cos.to(self.dtype), sin.to(self.dtype)) for cos, sin in tables]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[B, T, V]` fp32 of what the last layer gives, `[B, T, hidden]`."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return self._finish(logits.float())

    def run(self, step: Step, ids: Tensor, *, only_last: bool = False) -> Tensor:
        """Token ids `[B, T]` through the decoder layers to hidden states `[B, T, hidden]`.

        Args:
            only_last: Nobody asks for those of other tokens than the last: layers that store
                nothing are spared them, and `[B, 1, hidden]` is what comes out.
        """
        hidden = self.embed(ids)
        step.inputs = layer_inputs(self.model, ids, hidden)
        for index, layer in enumerate(decoder_layers(self.model)):
            if only_last and index == self._storing:
                hidden, step = hidden[:, -1:], step.last()
            hidden = through(layer, hidden, step)
        return hidden

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer is given of token ids `[B, T]`, `[B, T, hidden]`."""
        hidden: Tensor = self.model.model.embed_tokens(ids)
        return hidden if self._embedding_factor == 1 else hidden * self._embedding_factor

    def _has_paged_stores(self) -> bool:
        anything = torch.empty(0, device=self.device)
        try:
            triton = use_triton(anything)
            use_native(anything)
        except ValueError as error:  # of an environment variable
            raise UsageError(str(error)) from error
        if not triton:
            return False
        pages = self.new_pages(0, 0)
        return all(attention.new_paged_store(pages) is not None for attention in self.attentions)

    def _check_length(self, length: int) -> None:
        if length > self.max_context:
            raise UsageError(
                f"{length} tokens do not fit the model's context of {self.max_context} tokens"
            )

    def _table_of(self, rope: Rope) -> int:
        for i, known in enumerate(self._ropes):
            if known.equals(rope):
                return i
        self._ropes.append(rope)
        return len(self._ropes) - 1


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Stop tokens of the generation config, or of the tokenizer where that names none."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {int(eos)}
