"""The cases that kvpress is measured on, how its answers are scored, and the table.

python cases.py write CASES             what to read and to answer, as token ids
python cases.py score CASES ANSWERS     what `press.py` did with them, as results JSON
python cases.py table RESULTS ...       one markdown table of several results

Runs in kvtool's environment: texts, questions, averages and judgement are those of
`kvtool evaluate`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.evaluate import protocol, retrieval
from kvtool.evaluate.protocol import Estimate
from kvtool.evaluate.retrieval import Case, Question
from kvtool.evaluate.throughput import environment

MODEL = "smollm2"
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 50, 1024  # as many texts as kvpress would read


def write(arguments: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(MODEL)
    tokenizer, corpus = checkpoint.tokenizer(), evaluation_text()
    settings = {
        "model": MODEL,
        "dtype": "float32",
        "corpus": corpus.id,
        "prefill": arguments.prefill,
        "continuation": arguments.continuation,
        "windows": arguments.windows,
        "passkey_lengths": arguments.passkey_lengths,
        "passkey_depths": arguments.passkey_depths,
        "needle_lengths": arguments.needle_lengths,
        "needle_contexts": arguments.needle_contexts,
        "seed": arguments.seed,
    }
    seed = arguments.seed
    length = arguments.prefill + arguments.continuation + 1  # the last token is only a target
    cases = retrieval.passkey_cases(
        tokenizer, corpus.documents, arguments.passkey_lengths, arguments.passkey_depths, seed
    ) + retrieval.needle_cases(
        tokenizer, corpus.documents, arguments.needle_lengths, arguments.needle_contexts, seed
    )
    calibration = calibration_text().windows(
        tokenizer, CALIBRATION_TOKENS, CALIBRATION_WINDOWS, seed
    )
    content = {
        "model": str(checkpoint.path),
        "settings": settings,
        "answer_tokens": retrieval.ANSWER_TOKENS,
        "calibration": calibration.tolist(),
        "windows": corpus.windows(tokenizer, length, arguments.windows, seed).tolist(),
        "cases": [asdict(case) for case in cases],
    }
    arguments.cases.write_text(json.dumps(content))


def score(arguments: argparse.Namespace) -> None:
    content = json.loads(arguments.cases.read_text())
    answers = json.loads(arguments.answers.read_text())
    settings, tokenizer = content["settings"], Checkpoint.open(MODEL).tokenizer()
    cases = [
        Case(**{**case, "questions": [Question(**question) for question in case["questions"]]})
        for case in content["cases"]
    ]

    def correct(method: dict[str, Any]) -> list[list[bool]]:
        return [
            [
                retrieval.is_exact(str(tokenizer.decode(tokens)), question.answer)
                for tokens, question in zip(answered, case.questions, strict=True)
            ]
            for answered, case in zip(method["answers"], cases, strict=True)
        ]

    base = correct(answers["methods"][0])  # the uncompressed model
    rows = []
    for method in answers["methods"]:
        kl = Estimate.of([kl for _, _, kl in method["windows"]])
        ratio = Estimate.of([nll - base_nll for base_nll, nll, _ in method["windows"]]).exp()
        recalls = retrieval.summarise(list(zip(cases, correct(method), base, strict=True)))
        rows.append(
            {
                **{k: method[k] for k in ("method", "bytes", "frees_memory", "kept", "seconds")},
                "kl": asdict(kl),
                "perplexity_ratio": asdict(ratio),
                "retrieval": [asdict(recall) for recall in recalls],
            }
        )
    machine = {
        "cpu": environment(torch.device("cpu"), torch.float32)["cpu"],
        "threads": answers["threads"],
    }
    results = {
        "versions": answers["versions"],
        "machine": machine,
        "settings": settings,
        "methods": rows,
    }
    print(json.dumps(results, indent=2))


def estimate(value: dict[str, float]) -> str:
    error = value["standard_error"]
    return f"{value['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def recall(row: dict[str, Any], task: str, length: int) -> str:
    for found in row["retrieval"]:
        if (found["task"], found["length"]) == (task, length):
            return f"{found['correct']}/{found['asked']}"
    return "–"


def table(arguments: argparse.Namespace) -> None:
    results = [json.loads(file.read_text()) for file in arguments.results]
    settings = results[0]["settings"]
    for file, result in zip(arguments.results, results, strict=True):
        if result["settings"] != settings:
            raise SystemExit(f"error: {file} was measured on other cases than the files before it")
    tasks = [("pass-key", length) for length in settings["passkey_lengths"]]
    tasks += [("4-key needle", length) for length in settings["needle_lengths"]]
    columns = [
        "method",
        f"MB after {settings['prefill']} tokens",
        "keys kept",
        "KL",
        "perplexity ratio",
        *(f"{task} {length}" for task, length in tasks),
    ]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    rows = [row for result in results for row in result["methods"]]
    for row in sorted(rows, key=lambda row: (row["bytes"], row["kept"])):
        masked = row["kept"] < 1 and not row["frees_memory"]
        cells = [
            row["method"],
            f"{row['bytes'] / 1e6:.1f}" + (" (masked, frees nothing)" if masked else ""),
            f"{row['kept']:.1%}",
            estimate(row["kl"]),
            estimate(row["perplexity_ratio"]),
            *(recall(row, task, length) for task, length in tasks),
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("write")
    command.add_argument("cases", type=Path)
    command.add_argument("--prefill", type=int, default=protocol.PREFILL)
    command.add_argument("--continuation", type=int, default=protocol.CONTINUATION)
    command.add_argument("--windows", type=int, default=8)
    command.add_argument("--passkey-lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    command.add_argument("--passkey-depths", type=float, nargs="*", default=retrieval.DEPTHS)
    command.add_argument("--needle-lengths", type=int, nargs="*", default=retrieval.NEEDLE_LENGTHS)
    command.add_argument("--needle-contexts", type=int, default=retrieval.NEEDLE_CONTEXTS)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=write)
    command = commands.add_parser("score")
    command.add_argument("cases", type=Path)
    command.add_argument("answers", type=Path)
    command.set_defaults(run=score)
    command = commands.add_parser("table")
    command.add_argument("results", type=Path, nargs="+")
    command.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
