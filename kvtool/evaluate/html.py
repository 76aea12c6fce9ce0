"""Reports as pages: one file that fetches nothing and runs nothing, light, dark and on paper.

Whatever comes from a report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.filesize import decimal
from rich.table import Table

from kvtool.evaluate.compare import ABSENT, Comparison, estimate, share
from kvtool.evaluate.explain import Explained
from kvtool.evaluate.pictures import (
    DARK,
    LIGHT,
    Picture,
    bytes_picture,
    damage_picture,
    error_picture,
    kl_panel,
    pareto,
    position_picture,
    ratio_panel,
    style,
)
from kvtool.evaluate.spectra import code_pictures
from kvtool.evaluate.tables import margin, with_plan

CORRECT = {"kind": "correct", "mark": "✓", "name": "answered"}
LOST = {"kind": "lost", "mark": "✗", "name": "lost"}
WRONG = {"kind": "lost", "mark": "✗", "name": "not answered"}
NEITHER = {"kind": "neither", "mark": "–", "name": "the original fails too"}
OUTCOMES = (CORRECT, LOST, WRONG, NEITHER)


def report_page(report: Mapping[str, Any], table: Table | None = None) -> str:
    """The page of one report.

    Args:
        report: The content of a report.json, of any format version.
        table: All numbers, as they are shown on a terminal.

    Returns:
        HTML; sections for which the report has no data are left out.
    """
    result = report["divergence"]
    with style():
        sections = _sections(report)
    return _page(
        title=report["source"] + with_plan(report.get("plan")),
        against=report["base"],
        kicker="What the smaller cache keeps" if report["base"] else "What the cache costs",
        lead=f"{report['environment']['dtype']} on {report['environment']['device']}; "
        f"{result['windows']} windows of {result['prefill']} tokens read and "
        f"{result['continuation']} judged through the cache; text: {report['settings']['corpus']}"
        + _plan_words(report.get("plan")),
        headline=_headline(report),
        table=None if table is None else _table("All numbers", table),
        sections=sections,
        passkey=_passkey(report.get("passkey") or []),
        chat=_chat(report),
        samples=[_sample(sample) for sample in report.get("samples") or []],
        details=_details(report),
    )


def compare_page(comparison: Comparison) -> str:
    """The page of several reports: the picture of what each costs and keeps, and the table."""
    rows, given = comparison.rows, comparison.conditions
    best = ", ".join(row.label for row in rows if row.optimal)
    with style():
        pictures = [
            Picture.of(
                "Divergence by bytes",
                "The line joins what no other report beats in both; a triangle is below the axis.",
                f"KL against cache bytes of {len(rows)} reports; on the line: {best}.",
                pareto(rows, [kl_panel]),
            ),
            Picture.of(
                "Perplexity by bytes",
                "On the same tokens; 1 is the original.",
                f"Perplexity ratio against cache bytes of {len(rows)} reports.",
                pareto(rows, [ratio_panel]),
            ),
        ]
    return _page(
        title=f"{len(rows)} reports",
        against=given["original"],
        kicker="What each cache costs and keeps",
        lead=f"{given['dtype']}; {given['windows']} windows of {given['prefill']} tokens read "
        f"and {given['continuation']} judged through the cache; text: {given['corpus']}",
        table=_table("All reports", comparison.table()),
        sections=[{"title": "Bytes against quality", "text": "", "pictures": pictures}],
        details=[{"title": "Settings", "facts": list(_flat(given))}],
    )


def explain_page(explained: Explained) -> str:
    """The page of a plan of codes: spectra with their cuts, losses, and the table."""
    with style():
        pictures = code_pictures(explained)
    return _page(
        title=explained.model,
        kicker="What its codes keep",
        lead=f"{len(explained.codes)} codes by {explained.method}, "
        f"{explained.bytes_per_token:,} bytes per token as bfloat16 instead of "
        f"{explained.native_bytes_per_token:,}; {explained.words()}",
        sections=[{"title": "Spectra and losses", "text": "", "pictures": pictures}],
        table=_table("All codes", explained.table()),
    )


def _page(**content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(light=LIGHT, dark=DARK, **content)


def _table(title: str, table: Table) -> dict[str, Any]:
    columns = [
        {"header": str(column.header).replace("\n", " "), "right": column.justify == "right"}
        for column in table.columns
    ]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    return {"title": title, "columns": columns, "rows": rows}


def _headline(report: Mapping[str, Any]) -> list[dict[str, str]]:
    result, answers = report["divergence"], report["retrieval"]
    tokens = result["prefill"] + result["continuation"]
    if result["base_cache_bytes"] is None:
        right, asked = (sum(recall[key] for recall in answers) for key in ("correct", "asked"))
        return [
            _fact("cache", decimal(result["cache_bytes"]), f"for {tokens} tokens"),
            _estimate_fact("perplexity", result["perplexity"], 4, "of the text"),
            _fact("recall", f"{right}/{asked}", "questions answered"),
        ]
    saved, dtype = 1 - report["bytes_share"], "bfloat16"
    ours, theirs = result.get("bf16_bytes"), result.get("base_bf16_bytes")
    if ours is None:  # up to version 2
        ours, theirs = result["cache_bytes"], result["base_cache_bytes"]
        dtype = report["environment"]["dtype"]
    known = sum(recall["base_correct"] for recall in answers)
    kept = report["recall_share"]
    sizes = f"{decimal(ours)} instead of {decimal(theirs)} for {tokens} tokens"
    both = [estimate(result[name]["value"], None, 4) for name in ("perplexity", "base_perplexity")]
    facts = [
        _fact(
            "bytes saved" if saved >= 0 else "bytes added", f"{abs(saved):.1%}", f"{sizes}, {dtype}"
        ),
        _estimate_fact("KL", result["kl"], 3, "nats per token"),
        _estimate_fact("perplexity ratio", result["perplexity_ratio"], 4, " against ".join(both)),
        _fact(
            "recall kept",
            share(kept),
            "the original answers no question"
            if kept is None
            else f"{round(kept * known)} of {known} answers of the original",
        ),
    ]
    if (ended := _chat_kept(report)) is not None:
        facts.append(_fact("chats that end", share(report["chat_share"]), ended))
    return facts


def _fact(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _estimate_fact(
    name: str, number: Mapping[str, float | None], digits: int, detail: str
) -> dict[str, str]:
    error = number["standard_error"]
    spread = "" if error is None else f"± {margin(error)}; "
    return _fact(name, estimate(number["value"], None, digits), spread + detail)


_HEADS_WITH = {
    "budget": "have token budgets",
    "bits": "have few bits",
    "scales": "are in fp8",
    "sparse": "are read sparsely",
}


def _plan_words(plan: Mapping[str, Any] | None) -> str:
    if plan is None:
        return ""
    if codes := plan.get("codes"):
        return f"; plan: {_code_words(codes)}"
    if any("rank" in (layer.get("kept") or {}) for layer in plan.get("layers", ())):
        return "; plan: latents of few bits"
    streaming, layers = plan["streaming_heads"], plan.get("layers", ())
    words = [f"{streaming} of {plan['kv_heads']} KV heads stream"] if streaming else []
    heads = "others" if streaming else "heads"
    for field, said in _HEADS_WITH.items():
        if any(layer.get(field) for layer in layers):
            words.append(f"{heads} {said}")
    return f"; plan: {', '.join(words) or 'heads keep everything'}"


def _code_words(codes: Sequence[Mapping[str, Any]]) -> str:
    one, numbers = codes[0], sum(sum(code["widths"]) for code in codes)
    exact = f"exact: the first {one['sink']} and last {one['window']} tokens"
    return f"{len(codes)} {one['kind']} codes of {numbers:,} numbers in all, {exact}"


def _sections(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    positions = report["divergence"].get("positions") or []
    layers = report.get("layers") or []
    by_position = [
        position_picture(
            "Loss by position",
            "Mean negative log-likelihood of the text.",
            positions,
            {"nll": "measured", "base_nll": "original"},
        ),
        position_picture(
            "Divergence by position",
            "KL of the model under test from the original.",
            positions,
            {"kl": "measured"},
        ),
    ]
    by_layer = [damage_picture(layers), error_picture(layers), bytes_picture(layers)]
    found = (
        (
            "By position",
            "Shaded: judged through the cache. Before it: while the prompt was read.",
            by_position,
        ),
        ("By layer", "Decoder layers, counted from 0.", by_layer),
    )
    return [
        {"title": title, "text": text, "pictures": kept}
        for title, text, pictures in found
        if (kept := [picture for picture in pictures if picture is not None])
    ]


def _passkey(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Pass-key cases as a grid of lengths by depths."""
    if not cases:
        return None
    depths = sorted({case["depth"] for case in cases})
    lengths = sorted({case["length"] for case in cases})
    cells = {(case["length"], case["depth"]): _outcome(case) for case in cases}
    return {
        "depths": [f"{depth:.0%}" for depth in depths],
        "rows": [(length, [cells.get((length, d)) for d in depths]) for length in lengths],
        "legend": [cell for cell in OUTCOMES if cell in cells.values()],
    }


def _outcome(case: Mapping[str, Any]) -> dict[str, str]:
    if case["correct"]:
        return CORRECT
    return {True: LOST, False: NEITHER, None: WRONG}[case["base_correct"]]


def _chat(report: Mapping[str, Any]) -> dict[str, Any] | None:
    chat = report.get("chat")
    if not chat:
        return None
    prompts = chat["prompts"]
    ended = sum(prompt["ended"] for prompt in prompts)
    text = f"{ended} of {len(prompts)} end within {chat['max_new_tokens']} tokens"
    if (kept := _chat_kept(report)) is not None:
        text += f"; {kept}"
    return {"prompts": prompts, "paired": report["base"] is not None, "text": f"{text}."}


def _chat_kept(report: Mapping[str, Any]) -> str | None:
    """How many of the chat prompts that the original ends still end; None where it ends none."""
    prompts = (report.get("chat") or {}).get("prompts", [])
    ended = [prompt["ended"] for prompt in prompts if prompt["base_ended"]]
    return f"{sum(ended)} of {len(ended)} that the original ends" if ended else None


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of both models, without what both begin with."""
    base, text = sample["base"], sample["text"]
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(base or "", text, strict=False))
    )
    rest = None if base is None else base[same:]
    return {"prompt": sample["prompt"], "common": text[:same], "base": rest, "text": text[same:]}


def _details(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    run = {"seconds": round(report["seconds"], 1), **report["peak_memory"]}
    plan = {k: v for k, v in (report.get("plan") or {}).items() if k not in ("layers", "codes")}
    facts = {
        "Settings": report["settings"],
        "Plan": plan,
        "Conversion": report.get("conversion") or {},
        "Environment": {**report["environment"], **run},
    }
    found = [{"title": name, "facts": list(_flat(part))} for name, part in facts.items() if part]
    return found + [{"title": "Notes", "lines": report["notes"]}] * bool(report["notes"])


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of nested settings."""
    for name, value in values.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{words}: {inner}", text) for inner, text in _flat(value))
        elif isinstance(value, list):
            yield words, ", ".join(map(str, value))
        else:
            yield words, ABSENT if value is None else str(value)
