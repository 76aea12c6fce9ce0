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


def conversion(name: str) -> str:
    """How a checkpoint was made."""
    plan = read(f"mla_curve/{name}.convert.json")["plan"]
    words = [f"`{plan['method']}`"]
    if plan["target"] == "kvtool":
        words.append("`--target kvtool`")
    if healing := plan.get("healing"):
        words.append(f"`--heal {healing['tokens'] // 1000}k`")
    return ", ".join(words)


def ablation() -> None:
    budgets = [n for n in (288, 192, 144) if (RESULTS / f"mla_ablation_{n}.json").is_file()]
    if not budgets:
        return
    tables = {n: {r["row"]: r for r in read(f"mla_ablation_{n}.json")["rows"]} for n in budgets}
    print("| | " + " | ".join(f"{n / 384:.1%}" for n in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    for name in dict.fromkeys(name for rows in tables.values() for name in rows):
        cells = []
        for rows in tables.values():
            row = rows.get(name)
            cells.append(f"{row['kl']:.3f}, x{row['perplexity_ratio']:.3f}" if row else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


def quality() -> None:
    print("| | cache bytes per token | KL | perplexity ratio | pass-key | 4-key needle |")
    print("|---|---|---|---|---|---|")
    names = ["exact"]
    methods = ("transmla", "aware", "aware-kvtool", "healed")
    names += [f"{method}-{budget}" for budget in (75, 50, 37.5) for method in methods]
    for name in names:
        if not (RESULTS / f"mla_curve/{name}.json").is_file():
            continue
        report = read(f"mla_curve/{name}.json")
        divergence, cache = report["divergence"], report["cache"]
        kl, ratio = divergence["kl"], divergence["perplexity_ratio"]
        shown = f"{kl['value']:.1e}" if kl["value"] < 1e-4 else (
            f"{kl['value']:.3f} ± {kl['standard_error']:.3f}"
        )  # fmt: skip
        print(
            f"| {conversion(name)} | {cache['bytes_per_token_bf16']:.0f} "
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


def heads() -> None:
    """Streaming heads: methods beside the mean of the random choices."""
    result = read("heads.json")
    print("| heads that stream, chosen by | KL | perplexity ratio | pass-key | 4-key needle |")
    print("|---|---|---|---|---|")
    for share in sorted({row["share"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["share"] == share]
        chosen = [[row] for row in rows if "random" not in row["method"]]
        random = [row for row in rows if "random" in row["method"]]
        for group in [*chosen, *([random] if random else [])]:
            name = group[0]["method"].split(",")[0]
            name = f"random, mean of {len(group)}" if "random" in name else f"`{name}`"
            kl, ratio = (
                sum(row[key] for row in group) / len(group) for key in ("kl", "perplexity_ratio")
            )
            shown = "none" if not share else f"{share:.0%} {name}"
            cells = [found(group, task) for task in ("pass-key", "4-key needle")]
            print(f"| {shown} | {kl:.3f} | {ratio:.3f} | {cells[0]} | {cells[1]} |")


def found(group: list[dict], task: str) -> str:
    counts = [
        (right, asked)
        for row in group
        for name, (right, asked) in row["recall"].items()
        if name.startswith(task)
    ]
    right, asked = (sum(x) / len(group) for x in zip(*counts, strict=True))
    return f"{right:.3g}/{asked:.0f}"


def heal_starts() -> None:
    if not (RESULTS / "heal_starts/aware.jsonl").is_file():
        return
    logs = [
        [json.loads(line) for line in (RESULTS / f"heal_starts/{name}.jsonl").open()]
        for name in ("aware", "transmla")
    ]
    print("| healed tokens | loss from `aware` | loss from `transmla` |")
    print("|---|---|---|")
    for ours, theirs in zip(*logs, strict=True):
        print(f"| {2048 * ours['step']} | {ours['loss']:.3f} | {theirs['loss']:.3f} |")


if __name__ == "__main__":
    quality()
    ablation()
    heal_starts()
    speed()
    heads()
