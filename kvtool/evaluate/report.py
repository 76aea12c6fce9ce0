"""The measured numbers of one model beside its original's: the JSON file, the table, the gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from kvtool.evaluate.chat import Chat, Sample
from kvtool.evaluate.layers import LayerResult
from kvtool.evaluate.protocol import CacheSize, Divergence, Estimate
from kvtool.evaluate.retrieval import PassKey, Recall
from kvtool.evaluate.tables import margin, narrow_table, with_plan
from kvtool.evaluate.throughput import Bandwidth, Speed
from kvtool.plan import Plan

FORMAT_VERSION = 3
ABSENT = "–"


@dataclass(frozen=True)
class Gates:
    """The worst that a caller accepts; None does not judge.

    Attributes:
        min_recall: Of the retrieval questions that the original answers, the share still answered.
        min_chat_end: Of the chat prompts that the original ends, the share still ended.
    """

    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    min_recall: float | None = None
    min_chat_end: float | None = None

    @property
    def judge(self) -> bool:
        return any(gate is not None for gate in vars(self).values())


@dataclass(frozen=True)
class Report:
    """What `kvtool evaluate` measured.

    Attributes:
        base: The original, None where only absolute numbers were asked for.
        settings: Everything that decides the numbers: corpus, lengths, seeds.
        conversion: What the conversion took, by its manifest; None where nothing tells.
        plan: Facts of the plan that the cache was run with.
        peak_memory: Of the whole process, with every model that it held.
        notes: What was done otherwise than asked, in sentences.
        passkey: The pass-key cases that `retrieval` adds up.
        layers: One entry per decoder layer.
        samples: Continuations to read.
        chat: None where the model has no chat template, or was not asked.
    """

    source: str
    base: str | None
    settings: dict[str, Any]
    environment: dict[str, Any]
    cache: CacheSize
    base_cache: CacheSize | None
    divergence: Divergence
    retrieval: list[Recall]
    speed: Speed | None
    bandwidth: Bandwidth | None
    peak_memory: dict[str, int]
    seconds: float
    conversion: dict[str, float] | None = None
    plan: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    passkey: list[PassKey] = field(default_factory=list)
    layers: list[LayerResult] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    chat: Chat | None = None

    @property
    def bytes_share(self) -> float | None:
        """Bytes of the cache of one evaluated sequence as a share of the original's, where exact
        numbers of both are bfloat16.
        """
        found = self.divergence
        if found.bf16_bytes is None or not found.base_bf16_bytes:
            return None
        return found.bf16_bytes / found.base_bf16_bytes

    @property
    def recall_share(self) -> float | None:
        """Of what the original answers, the share still answered; None where it answers nothing."""
        base = sum(recall.base_correct or 0 for recall in self.retrieval)
        return sum(recall.kept or 0 for recall in self.retrieval) / base if base else None

    @property
    def chat_share(self) -> float | None:
        """Of the prompts that the original ends, the share ended too; None where it ends none."""
        prompts = self.chat.prompts if self.chat is not None else []
        kept = [prompt.ended for prompt in prompts if prompt.base_ended]
        return sum(kept) / len(kept) if kept else None

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "bytes_share": self.bytes_share,
            "recall_share": self.recall_share,
            "chat_share": self.chat_share,
        }

    def failures(self, gates: Gates) -> list[str]:
        """A sentence for every gate that does not hold; what cannot be measured does not hold."""
        failed = []
        for name, measured, limit in (
            ("KL", self.divergence.kl, gates.max_kl),
            ("perplexity ratio", self.divergence.perplexity_ratio, gates.max_ppl_ratio),
        ):
            value = float("nan") if measured is None else measured.value
            if limit is not None and not value <= limit:  # NaN must fail
                failed.append(f"{name} {value:.3g} is above the allowed {limit:g}")
        for name, share, least, nothing in (
            ("recall is", self.recall_share, gates.min_recall, "answers no question"),
            ("chat endings are", self.chat_share, gates.min_chat_end, "ends no chat prompt"),
        ):
            if least is None:
                continue
            if share is None:
                failed.append(f"{name.split()[0]} cannot be judged, the original {nothing}")
            elif share < least:
                failed.append(
                    f"{name} {share:.1%} of the original's, below the allowed {least:.1%}"
                )
        return failed

    def table(self) -> Table:
        """Every number with the original's beside it."""
        table = Table(title=self._title(), title_justify="left")
        table.add_column("measure", overflow="fold")
        for name in ("original", "measured", "measured /\noriginal"):
            table.add_column(name, justify="right", overflow="fold")
        if self.plan is not None:
            _add_plan(table, self.plan)
        self._add_cache(table)
        self._add_divergence(table)
        for recall in self.retrieval:
            table.add_row(
                f"{recall.task}, {recall.length} tokens",
                ABSENT if recall.base_correct is None else f"{recall.base_correct}/{recall.asked}",
                f"{recall.correct}/{recall.asked}",
                ABSENT if not recall.base_correct else f"keeps {recall.kept}/{recall.base_correct}",
            )
        if self.chat is not None:
            self._add_chat(table, self.chat)
        if self.speed is not None:
            self._add_speed(table, self.speed)
        cost = self.conversion or {}
        if "seconds" in cost:
            table.add_row("conversion, seconds", ABSENT, f"{cost['seconds']:.1f}", ABSENT)
        if "peak_memory_bytes" in cost:
            size = _size(cost["peak_memory_bytes"])
            table.add_row("conversion, peak memory", ABSENT, size, ABSENT)
        for name, peak in self.peak_memory.items():
            owner = name.removesuffix("_bytes")
            table.add_row(f"peak memory, whole {owner}", ABSENT, _size(peak), ABSENT)
        if self.notes:
            table.caption = "\n".join(self.notes)
            table.caption_justify = "left"
        return table

    def _title(self) -> str:
        against = f" against {self.base}" if self.base is not None else ""
        dtype, device = self.environment["dtype"], self.environment["device"]
        what = self.source + with_plan(self.plan)
        return f"{what}{against} ({dtype}, {device}, {self.seconds:.0f} s)"

    def _add_cache(self, table: Table) -> None:
        base, cache, dtype = self.base_cache, self.cache, self.environment["dtype"]
        rows: list[tuple[str, float | None, float]] = [
            (
                "cache, bytes per token as bfloat16",
                base.bytes_per_token_bf16 if base else None,
                cache.bytes_per_token_bf16,
            ),
            (
                f"cache, bytes per token as run ({dtype})",
                base.bytes_per_token if base else None,
                cache.bytes_per_token,
            ),
            (
                "cache, constant bytes per sequence as run",
                base.constant_bytes if base else None,
                cache.constant_bytes,
            ),
        ]
        result = self.divergence
        tokens = f"cache of {result.prefill + result.continuation} tokens, bytes"
        if result.bf16_bytes is not None:
            rows.append((f"{tokens} as bfloat16", result.base_bf16_bytes, result.bf16_bytes))
        rows.append((f"{tokens} as run", result.base_cache_bytes, result.cache_bytes))
        for name, original, measured in rows:
            shown = ABSENT if original is None else f"{original:,.0f}"
            table.add_row(name, shown, f"{measured:,.0f}", _percent(measured, original))

    def _add_divergence(self, table: Table) -> None:
        result = self.divergence
        span = f"{result.prefill}+{result.continuation} tokens, {result.windows} windows"
        if result.kl is not None:
            table.add_row(f"KL in nats ({span})", "0", _estimate(result.kl), ABSENT)
        table.add_row(
            "perplexity (same tokens)" if result.kl is not None else f"perplexity ({span})",
            _estimate(result.base_perplexity, digits=5),
            _estimate(result.perplexity, digits=5),
            _estimate(result.perplexity_ratio, digits=5),
        )
        if result.top1_agreement is not None:
            table.add_row(
                "same most likely token", ABSENT, f"{result.top1_agreement.value:.2%}", ABSENT
            )

    def _add_chat(self, table: Table, chat: Chat) -> None:
        ended = [prompt.ended for prompt in chat.prompts]
        known = [prompt for prompt in chat.prompts if prompt.base_ended]
        kept = sum(prompt.ended for prompt in known)
        table.add_row(
            f"chat prompts that end ({chat.max_new_tokens} tokens)",
            ABSENT if self.base is None else f"{len(known)}/{len(ended)}",
            f"{sum(ended)}/{len(ended)}",
            f"keeps {kept}/{len(known)}" if known else ABSENT,
        )

    def _add_speed(self, table: Table, speed: Speed) -> None:
        at = f"at {speed.context}, tokens/s"
        dense, ours, theirs = speed.dense, speed.ours, speed.transformers
        for name, rate in (
            ("prefill", "prefill_tokens_per_second"),
            ("decode", "decode_tokens_per_second"),
        ):
            measured = getattr(ours, rate)
            if dense is not None:
                original = getattr(dense, rate)
                table.add_row(
                    f"{name} {at}, both in kvtool",
                    f"{original:.1f}",
                    f"{measured:.1f}",
                    f"{measured / original:.2f} x",
                )
            original = getattr(theirs, rate)
            table.add_row(
                f"{name} {at}, original in transformers",
                f"{original:.1f}",
                f"{measured:.1f}",
                f"{measured / original:.2f} x",
            )


def _add_plan(table: Table, plan: dict[str, Any]) -> None:
    """Rows for what :func:`plan_facts` says."""
    if codes := plan["codes"]:
        width, kind = sum(sum(code["widths"]) for code in codes), codes[0]["kind"]
        table.add_row(f"numbers of {len(codes)} {kind} codes", ABSENT, f"{width:,}", ABSENT)
        exact = f"{codes[0]['sink']} + {codes[0]['window']}"
        table.add_row("first + last tokens, kept exactly", ABSENT, exact, ABSENT)
    elif streaming := plan["streaming_heads"]:
        how = "read densely, then dropped" if plan["prefill"] == "dense" else "streamed"
        heads = f"{streaming}/{plan['kv_heads']}"
        table.add_row(f"KV heads that stream (prompts are {how})", "0", heads, ABSENT)
    else:
        table.add_row("how prompts are read", ABSENT, plan["prefill"], ABSENT)
    for part in ("keys", "values"):
        if each := {_bits_of(part, x["bits"]) for x in plan["layers"] if x["bits"] is not None}:
            table.add_row(f"bits of {part}", ABSENT, ", ".join(sorted(each)), ABSENT)
    if any(x["scales"] for x in plan["layers"]):
        table.add_row("keys and values", ABSENT, "fp8", ABSENT)
    if (policy := plan["policy"]) is not None:
        table.add_row("tokens of a prompt chosen by", ABSENT, policy, ABSENT)
    if read := {x["sparse"]["tokens"] for x in plan["layers"] if x["sparse"] is not None}:
        most = ", ".join(map(str, sorted(read)))
        table.add_row("tokens that a new one reads (full heads keep all)", "all", most, ABSENT)


def tiers(bits: dict[str, Any], part: str) -> str:
    """The bits of the keys or values of one layer: 4, or of two tiers 4/2."""
    return f"{bits[part]}/{bits['rest'][part]}" if bits["rest"] else f"{bits[part]}"


def _bits_of(part: str, bits: dict[str, Any]) -> str:
    """The same, and where few numbers are kept, how many."""
    told = tiers(bits, part)
    return f"{told}, {bits['kept']} kept" if part == "values" and bits["kept"] else told


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What a report says of the plan that a cache was run with."""
    return {
        "methods": [item.get("method") for item in plan.provenance],
        "prefill": plan.prefill,
        "policy": plan.policy,
        "streaming_heads": plan.streaming_heads,
        "kv_heads": sum(len(layer.streaming) for layer in plan.layers),
        "layers": [asdict(layer) for layer in plan.layers],
        "codes": [asdict(code) for code in plan.codes],
    }


def speed_table(speeds: list[Speed], title: str) -> Table:
    """One row per context length, for `kvtool bench`."""
    dense = any(speed.dense is not None for speed in speeds)
    theirs = "trans-\nformers"
    columns = (
        "context",
        "prefill\ntok/s",
        theirs,
        "ratio",
        "decode\ntok/s",
        theirs,
        "ratio",
        *(["original\nin\nkvtool"] if dense else []),
        "step\nms",
        "floor\nms",
        "share of\nfloor",
    )
    table = narrow_table(title, (), columns)
    for speed in speeds:
        ours, rival = speed.ours, speed.transformers
        table.add_row(
            f"{speed.context}",
            f"{ours.prefill_tokens_per_second:.1f}",
            f"{rival.prefill_tokens_per_second:.1f}",
            f"{speed.prefill_ratio:.2f}",
            f"{ours.decode_tokens_per_second:.1f}",
            f"{rival.decode_tokens_per_second:.1f}",
            f"{speed.decode_ratio:.2f}",
            *([f"{speed.dense.decode_tokens_per_second:.1f}"] if speed.dense else []),
            f"{ours.step_seconds * 1e3:.1f}",
            f"{speed.floor_seconds * 1e3:.1f}",
            f"{speed.share_of_floor:.0%}",
        )
    return table


def _estimate(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ABSENT
    value = f"{estimate.value:.{digits}g}"
    error = estimate.standard_error
    return value if error is None else f"{value} ± {margin(error)}"


def _percent(measured: float, original: float | None) -> str:
    return f"{measured / original:.1%}" if original else ABSENT


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
