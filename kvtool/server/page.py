"""The status page: what the memory holds, as one HTML page without scripts or anything to fetch."""

from __future__ import annotations

from html import escape

from rich.filesize import decimal

from kvtool.server.worker import State

_STYLE = """
:root { color-scheme: light dark; --line: #8883; --own: #2a78d6; --kept: #8fb8e8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: 0; }
.quiet { opacity: .7; }
.facts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
  margin: 1.5rem 0; padding: 0; list-style: none; }
.facts li { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.facts strong { display: block; font-size: 1.3rem; line-height: 1.4; }
.facts span { display: block; font-size: .85rem; opacity: .7; }
.bar { display: flex; height: 1.1rem; margin: .3rem 0 .9rem; border-radius: .25rem;
  background: var(--line); overflow: hidden; }
.own { background: var(--own); }
.kept { background: var(--kept); }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
"""


def status_page(model: str, description: str, state: State) -> str:
    """The page at `/`; it asks for itself again every two seconds."""
    own, native = state.used - state.shared, state.native_bytes
    counters = state.counters
    facts = {
        "Memory": (
            f"{state.share:.0%}",
            f"{decimal(state.used)} of {decimal(state.budget)}",
        ),
        "Requests": (
            f"{state.running:,} running",
            f"{state.waiting:,} waiting, {counters.preemptions:,} preempted so far",
        ),
        "Speed": (
            f"{state.tokens_per_second:.1f} tokens/s",
            f"reading {decimal(round(state.bandwidth))}/s while decoding",
        ),
        "Saved": (
            decimal(round(max(0.0, native - own))),
            f"{state.compression:.2f}x smaller than uncompressed"
            if state.stored_tokens
            else "against the uncompressed cache",
        ),
    }
    cards = "".join(
        f"<li>{name}<strong>{value}</strong><span>{more}</span></li>"
        for name, (value, more) in facts.items()
    )
    longest = max(native, state.used, 1)
    rows = "".join(
        f"<tr><td>{prompt:,}</td><td>{new:,}</td><td>{decimal(nbytes)}</td>"
        f"<td>{decimal(round((prompt + new) * state.native_bytes_per_token))}</td></tr>"
        for prompt, new, nbytes in state.requests
    )
    running = (
        "<table><tr><th>prompt tokens</th><th>new tokens</th><th>cache</th>"
        f"<th>uncompressed</th></tr>{rows}</table>"
        if rows
        else '<p class="quiet">No request is running.</p>'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="2">'
        f"<title>kvtool: {escape(model)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(model)}</h1><p class="quiet">{escape(description)}</p>'
        f'<ul class="facts">{cards}</ul>'
        f"<p>Caches: {decimal(own)} of running requests ({state.stored_tokens:,} tokens), "
        f"{decimal(state.shared)} kept for prompts that start alike</p>"
        f"{_bar(own / longest, state.shared / longest)}"
        f"<p>Uncompressed: {decimal(round(native))}</p>{_bar(native / longest)}"
        f'<p class="quiet">A further token takes {state.bytes_per_token:,.0f} bytes, '
        f"uncompressed {state.native_bytes_per_token:,.0f}. Since the start: "
        f"{counters.prompt_tokens:,} prompt tokens, {counters.prefix_hits:,} of them shared, and "
        f"{counters.new_tokens:,} new ones.</p><h2>Running</h2>{running}</body></html>"
    )


def _bar(own: float, kept: float = 0.0) -> str:
    """A bar filled to two shares of its length."""
    parts = f'<div class="own" style="width:{own:.2%}"></div>' if own else ""
    parts += f'<div class="kept" style="width:{kept:.2%}"></div>' if kept else ""
    return f'<div class="bar">{parts}</div>'
