"""Quality of `convert --to mamba` against layers replaced, beside its controls, in two steps.

`prepare` reads the text once, on any machine: token ids to solve on, to learn from and to judge by,
and how far the heads of the model look back. `teach` needs nothing else but the model: it ranks the
layers, teaches the result and its controls for the same time, and judges them, also by pass-keys.
It writes what it knows as it goes, and the mixers layer by layer.

    python benchmarks/mamba.py prepare smollm2 --data text.txt --tokens 12M -o lessons.safetensors
    python benchmarks/mamba.py teach smollm2 lessons.safetensors --layers 8,15 --seconds 90 -o DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtool import distill
from kvtool.calibrate.layer_importance import ImportanceOptions, rank_layers
from kvtool.checkpoint import Checkpoint
from kvtool.convert.teaching import (
    ARMS,
    EVALUATION,
    Lessons,
    Steps,
    Taught,
    Teacher,
    beats,
)
from kvtool.corpus import evaluation_text
from kvtool.distill import Amount
from kvtool.evaluate import retrieval
from kvtool.hybrid import Arm, HybridModel

SOLVE, SOLVED = 16, 1024
"""Texts that read-outs are solved on, and their tokens."""
JUDGE, JUDGED = 8, 2048
PASSKEY_LENGTHS = (512, 1024, 2048)
_STARTED = time.perf_counter()


def say(*words: Any) -> None:
    """Prints with the time since the start, at once."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s]", *words, flush=True)


def prepare(args: argparse.Namespace) -> None:
    """Everything that needs a tokenizer and text."""
    from kvtool.calibrate import statistics
    from kvtool.calibrate.lessons import lessons
    from kvtool.calibrate.statistics import StatisticsOptions
    from kvtool.corpus import calibration_text

    checkpoint = Checkpoint.open(args.model)
    tokenizer = checkpoint.tokenizer()
    amount = Amount.parse(args.tokens, "--tokens", 0)
    chat = StatisticsOptions.chat
    found = statistics.collect(checkpoint, StatisticsOptions())
    reach = torch.stack([found.layer(i).reach for i in range(len(found))])
    say("statistics are there")
    learn = lessons(checkpoint, args.data, amount.steps(args.window), args.window, 0)
    say(f"{learn.numel()} tokens to learn from")
    solve = calibration_text(None).windows(tokenizer, SOLVED, SOLVE, 0, chat)
    judged = evaluation_text(None).windows(tokenizer, JUDGED, JUDGE)
    ids = {"learn": learn, "solve": solve, "judge": judged}
    narrow = {name: x.to(torch.int32).to(torch.uint16) for name, x in ids.items()}
    save_file({**narrow, "reach": reach}, args.output, {"spoken": json.dumps(_spoken(tokenizer))})
    say(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


def _spoken(tokenizer: Any) -> list[int]:
    """Token ids by which a tokenizer is known: other versions build others from one file."""
    return list(tokenizer("The capital of France is 1,234 km away.\n\n").input_ids)


class Results:
    """What is known so far, on disk after every piece."""

    def __init__(self, folder: Path, **about: Any) -> None:
        self.folder, self.known = folder, dict(about)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value: Any) -> None:
        """Notes and writes."""
        self.known[name] = value
        self.known["seconds"] = time.perf_counter() - _STARTED
        text = json.dumps(self.known, indent=1) + "\n"
        (self.folder / "results.json").write_text(text, encoding="utf-8")


def teach(args: argparse.Namespace) -> None:
    """Ranks, teaches and judges."""
    device = args.device
    checkpoint = Checkpoint.open(args.model)
    tokenizer = checkpoint.tokenizer()
    with safe_open(args.lessons, "pt") as file:
        spoken = json.loads(file.metadata()["spoken"])
    if _spoken(tokenizer) != spoken:
        sys.exit(f"the tokenizer of {args.model} is not the one that {args.lessons} was made with")
    stored = load_file(args.lessons)
    reach = dict(enumerate(stored["reach"]))
    texts = {name: stored[name].to(torch.int32).long() for name in ("learn", "solve", "judge")}
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device
    results = Results(
        args.output,
        model=checkpoint.source,
        device=name,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        command=" ".join(sys.argv),
        window=texts["learn"].shape[1],
    )
    say(f"on {name}; {texts['learn'].numel()} tokens to learn from")
    ranked = args.ranking
    if ranked is None:
        options = ImportanceOptions(max(args.layers), steps=args.probe_steps)
        scores = rank_layers(checkpoint, options, stored["reach"], device=device, report=report)
        ranked = [score.layer for score in scores]
        results.add("importance", [asdict(score) for score in scores])
    say("layers, the least important first:", ranked)
    cases = retrieval.passkey_cases(tokenizer, evaluation_text(None).documents, args.lengths)
    steps: Steps | None = None
    for count in args.layers:
        chosen = {i: reach[i] for i in sorted(ranked[:count])}
        batch = args.batch
        if args.seconds > 0:
            steps = measured(checkpoint, chosen, texts, args, device)
        learned = 0 if steps is None else steps.total * batch
        lessons = Lessons(texts["solve"], texts["learn"][:learned], texts["judge"])
        logs = args.states / str(count)
        teacher = Teacher(
            checkpoint, chosen, lessons, steps, loss=args.loss, device=device, report=report,
            rate=args.rate, folder=logs,
        )  # fmt: skip
        arms: Sequence[Arm] = ARMS if count in args.controls else ARMS[:1]
        about: dict[str, Any] = {
            "layers": sorted(chosen),
            "steps": steps and asdict(steps),
            "tokens": learned * texts["learn"].shape[1],
        }
        judged = {}
        for arm in arms:
            started = time.perf_counter()
            taught = teacher.teach(arm)
            seconds = time.perf_counter() - started
            judged[arm] = taught.judged
            about[arm] = {**told(taught), "seconds": seconds, "course": course(logs, arm)}
            results.add(f"replaced {count}", about)
            say(
                f"{count} layers, {arm}: KL {taught.judged.mean_kl:.4f}, perplexity "
                f"x{taught.judged.perplexity_ratio:.4f}, {seconds:.0f} s"
            )
            if arm == "mamba":
                save_mixers(taught.hybrid, args.output / f"mamba-{count}")
            if args.passkeys:
                if "original" not in results.known:
                    results.add(
                        "original", {"pass_key": passkeys(taught.hybrid, tokenizer, cases, ())}
                    )
                    say("original recalls", results.known["original"]["pass_key"])
                about[arm]["pass_key"] = passkeys(taught.hybrid, tokenizer, cases)
                results.add(f"replaced {count}", about)
                say(f"{count} layers, {arm} recalls", about[arm]["pass_key"])
            del taught
        about["beaten"] = {arm: beats(judged["mamba"], judged[arm]) for arm in arms[1:]}
        results.add(f"replaced {count}", about)
    say("done")


_said: list[tuple[str, int]] = []


def report(stage: str, done: int, total: int) -> None:
    """A line per tenth of a stage."""
    tenth = 10 * done // max(total, 1)
    if not _said or _said[-1] != (stage, tenth):
        _said[:] = [(stage, tenth)]
        say(f"{stage} {done}/{total}")


def measured(
    checkpoint: Checkpoint,
    reach: dict[int, Tensor],
    texts: dict[str, Tensor],
    args: argparse.Namespace,
    device: str,
) -> Steps:
    """As many steps as fit into the time, and as there is text for."""
    lessons = Lessons(texts["solve"], texts["learn"][: args.batch], texts["judge"])
    one = Teacher(checkpoint, reach, lessons, None, device=device).step_seconds()
    steps = min(int(args.seconds / one), len(texts["learn"]) // args.batch)
    tokens = args.batch * texts["learn"].shape[1]
    say(f"a step of {tokens} tokens: {one:.3f} s; {steps} steps")
    return Steps.of(max(3, steps), args.batch)


def told(taught: Taught) -> dict[str, Any]:
    """What is kept of an arm."""
    judged = taught.judged
    return {
        "kl": judged.mean_kl,
        "perplexity_ratio": judged.perplexity_ratio,
        "kl_by_text": judged.kl,
        "error": taught.error,
        "learned": taught.learned,
    }


def course(logs: Path, arm: Arm) -> dict[str, Any]:
    """By stage the mean loss of each tenth, and what was judged on the way."""
    found: dict[str, Any] = {}
    for stage in ("mimic", "align", "distil"):
        folder = logs / f"{arm}-{stage}"
        if not folder.is_dir():
            continue
        lines = (folder / distill.LOG).read_text(encoding="utf-8").splitlines()
        loss = [json.loads(line)["loss"] for line in lines]
        size = max(1, len(loss) // 10)
        tenths = [loss[i : i + size] for i in range(0, len(loss), size)]
        found[stage] = {"loss": [sum(part) / len(part) for part in tenths]}
        if (judged := folder / EVALUATION).is_file():
            rows = judged.read_text(encoding="utf-8").splitlines()
            found[stage]["judged"] = [json.loads(row) for row in rows]
    return found


@torch.no_grad()
def passkeys(
    hybrid: HybridModel,
    tokenizer: Any,
    cases: Sequence[retrieval.Case],
    replaced: Sequence[int] | None = None,
) -> dict[str, str]:
    """By length how many keys are recalled: greedily, and without a cache."""
    right: dict[int, list[bool]] = {}
    for case in cases:
        (question,) = case.questions
        ids = torch.tensor([*case.context, *question.ids], device=hybrid.device)
        answer = []
        for _ in range(retrieval.ANSWER_TOKENS):
            states = hybrid.states(ids[None], replaced)[0, -1]
            answer.append(int((states @ hybrid.head.T).argmax()))
            ids = torch.cat((ids, ids.new_tensor(answer[-1:])))
        text = str(tokenizer.decode(answer))
        right.setdefault(case.length, []).append(retrieval.is_exact(text, question.answer))
    return {str(n): f"{sum(found)}/{len(found)}" for n, found in right.items()}


def save_mixers(hybrid: HybridModel, folder: Path) -> None:
    """A file per layer, so that none is large."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, slot in hybrid.slots.items():
        state = {n: t.detach().cpu().contiguous() for n, t in slot.replacement.state_dict().items()}
        save_file(state, folder / f"layer-{index:02d}.safetensors")


def main() -> None:
    """Parses and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare")
    one.add_argument("model")
    one.add_argument("--data")
    one.add_argument("--tokens", default="12M")
    one.add_argument("--window", type=int, default=2048)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.set_defaults(run=prepare)
    two = commands.add_parser("teach")
    two.add_argument("model")
    two.add_argument("lessons", type=Path)
    two.add_argument("--layers", type=_numbers, default=[8], help="numbers of layers to replace")
    two.add_argument("--controls", type=_numbers, help="for which of them; all, if not given")
    two.add_argument("--ranking", type=_numbers, help="layers, the least important first")
    two.add_argument("--probe-steps", type=int, default=40)
    two.add_argument("--seconds", type=float, default=90, help="of teaching, per arm; 0 for none")
    two.add_argument("--batch", type=int, default=8, help="texts of a step")
    two.add_argument("--loss", default="forward-kl", choices=["forward-kl", "reverse-kl"])
    two.add_argument("--rate", type=float, default=1.0, help="multiplies all learning rates")
    two.add_argument("--passkeys", action=argparse.BooleanOptionalAction, default=True)
    two.add_argument("--lengths", type=_numbers, default=list(PASSKEY_LENGTHS), help="of pass-keys")
    two.add_argument("--states", type=Path, help="folder of states, to go on from if killed")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two.add_argument("-o", "--output", type=Path, required=True)
    two.set_defaults(run=teach)
    args = parser.parse_args()
    if getattr(args, "layers", None) and args.controls is None:
        args.controls = args.layers
    with tempfile.TemporaryDirectory() as folder:
        if getattr(args, "states", folder) is None:
            args.states = Path(folder)
        args.run(args)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
