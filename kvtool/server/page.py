"""The status page: what the memory holds, as one HTML page without scripts or anything to fetch."""

from __future__ import annotations

from html import escape

from rich.filesize import decimal

from kvtool.server.worker import State

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin-bottom: 0; }
p.lead { margin-top: 0; opacity: .7; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #8884; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
progress { width: 100%; height: 1.2rem; }
"""


def status_page(model: str, description: str, state: State) -> str:
    """The page at `/`; it asks for itself again every two seconds."""
    saved = max(0.0, state.native_bytes - (state.used - state.shared))
    counters = state.counters
    rows = {
        "Requests": f"{state.running} running, {state.waiting} waiting",
        "Decode": f"{state.tokens_per_second:.1f} tokens/s",
        "Cache of running requests": f"{decimal(state.used - state.shared)} for "
        f"{state.stored_tokens:,} tokens",
        "The same uncompressed": decimal(round(state.native_bytes)),
        "Saved": f"{decimal(round(saved))} ({state.compression:.2f}x)",
        "Kept for prompts that start alike": decimal(state.shared),
        "A further token": f"{state.bytes_per_token:,.0f} bytes; uncompressed "
        f"{state.native_bytes_per_token:,.0f}",
        "Since the start": f"{counters.prompt_tokens:,} prompt tokens, "
        f"{counters.prefix_hits:,} of them shared; {counters.new_tokens:,} new tokens; "
        f"{counters.preemptions:,} preemptions",
    }
    facts = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
    requests = "".join(
        f'<tr><td class="number">{prompt:,}</td><td class="number">{new:,}</td>'
        f'<td class="number">{decimal(nbytes)}</td></tr>'
        for prompt, new, nbytes in state.requests
    )
    running = (
        '<table><tr><th class="number">prompt tokens</th><th class="number">new tokens</th>'
        f'<th class="number">cache</th></tr>{requests}</table>'
        if requests
        else "<p>No request is running.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="2">'
        f"<title>kvtool: {escape(model)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(model)}</h1><p class="lead">{escape(description)}</p>'
        f"<p>Memory: {decimal(state.used)} of {decimal(state.budget)}</p>"
        f'<progress value="{state.share:.4f}" max="1">{state.share:.0%}</progress>'
        f"<table>{facts}</table><h2>Running</h2>{running}</body></html>"
    )
