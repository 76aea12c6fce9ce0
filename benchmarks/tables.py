"""Prints the tables of the README from `results/`.

python benchmarks/tables.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SIDES = ("transformers", "dense", "ours")
SMOLLM2_BYTES, CACHE_BYTES = 538_060_032, 46_080  # fp32 weights; fp32 cache per token


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def recall(report: dict, task: str) -> str:
    rows = [r for r in report["retrieval"] if r["task"] == task]
    got, base, asked = (sum(r[k] for r in rows) for k in ("correct", "base_correct", "asked"))
    return f"{got}/{asked} (original {base}/{asked})"


def quality() -> None:
    print("| | cache bytes per token | KL | perplexity ratio | pass-key | 4-key needle |")
    print("|---|---|---|---|---|---|")
    for name in ("exact", "transmla-75", "transmla-50", "transmla-37.5"):
        report = read(f"mla_curve/{name}.json")
        divergence, cache = report["divergence"], report["cache"]
        kl, ratio = divergence["kl"], divergence["perplexity_ratio"]
        shown = f"{kl['value']:.1e}" if kl["value"] < 1e-4 else (
            f"{kl['value']:.3f} ± {kl['standard_error']:.3f}"
        )  # fmt: skip
        print(
            f"| `{name.split('-')[0]}` | {cache['bytes_per_token_bf16']:.0f} "
            f"({report['bytes_share']:.1%}) | {shown} | {ratio['value']:.3f} ± "
            f"{ratio['standard_error']:.3f} | {recall(report, 'pass-key')} | "
            f"{recall(report, '4-key needle')} |"
        )


def speed() -> None:
    report = read("decode.json")
    read_per_second = max(report["bandwidth"].values())
    print("| context | transformers | kvtool, all keys and values | | kvtool, latent at 50 % | |")
    print("|---|---|---|---|---|---|")
    for row in report["speeds"]:
        stock, dense, latent = (
            row[side]["decode_tokens_per_second"] for side in ("transformers", "dense", "ours")
        )
        floor = (SMOLLM2_BYTES + CACHE_BYTES * row["context"]) / read_per_second
        print(
            f"| {row['context']} | {stock:.1f} | {dense:.1f} | {dense / stock:.2f}x, "
            f"{floor * dense:.0%} of the floor | {latent:.1f} | {latent / stock:.2f}x, "
            f"{row['share_of_floor']:.0%} of the floor |"
        )
    print("\nPrefill, tokens/s:\n")
    print("| context | transformers | kvtool, all keys and values | kvtool, latent at 50 % |")
    print("|---|---|---|---|")
    for row in report["speeds"]:
        sides = [row[side]["prefill_tokens_per_second"] for side in SIDES]
        print(f"| {row['context']} | " + " | ".join(f"{x:.0f}" for x in sides) + " |")


if __name__ == "__main__":
    quality()
    speed()
