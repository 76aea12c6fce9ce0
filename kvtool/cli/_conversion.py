"""What ``kvtool convert`` does around a conversion, whatever it converts to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.cli.verify import result_of
from kvtool.errors import GateError, KvtoolError
from kvtool.fp8 import skip_flag

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint
    from kvtool.convert.conversion import ConversionResult
    from kvtool.progress import Progress


@dataclass(frozen=True)
class Run:
    """A conversion that was asked for; the fields are those of the command.

    Attributes:
        device: Where it teaches.
    """

    checkpoint: Checkpoint
    output: Path
    teacher: Checkpoint | None
    device: str
    overwrite: bool
    resume: bool
    dry_run: bool
    verify: bool
    json: bool
    quiet: bool

    @property
    def is_first(self) -> bool:
        """Whether this process plans, writes and speaks: others of accelerate launch only teach."""
        from kvtool.distill import processes

        return processes()[0] == 0

    @property
    def conditions(self) -> dict[str, Any]:
        """What the functions that convert are told beside the options."""
        return {
            "overwrite": self.overwrite,
            "resume": self.resume,
            "device": self.device,
            "teacher": self.teacher,
        }

    def progress(self) -> AbstractContextManager[Progress]:
        """Of the process that speaks."""
        return _console.progress(self.quiet or not self.is_first)

    def check_memory(self, plan: dict[str, Any]) -> None:
        """Before the work, also of what comes last: verification holds a model in float32.

        Raises:
            ResourceError: There is not enough.
        """
        hint = "a smaller --shard-size, fewer --tokens"
        _options.check_memory("converting", plan["memory_bytes"], "cpu", hint)
        if self.verify:
            needed = plan["verify_memory_bytes"]
            _options.check_memory("verifying", needed, "cpu", "--no-verify")
        if (healing := plan["healing"]) is not None:
            needed, hint = healing["memory_bytes"], "convert without --heal"
            _options.check_memory("healing", needed, self.device, hint)

    def show(self, plan: dict[str, Any]) -> None:
        """Prints what a dry run found."""
        table = self._table("nothing written", plan)
        table.add_row("disk needed", decimal(plan["disk_bytes"]))
        table.add_row("memory to convert, about", decimal(plan["memory_bytes"]))
        _console.emit(plan, self.json, table)

    def finish(self, result: ConversionResult, more: Mapping[str, str] | None = None) -> None:
        """Verifies what was written if asked to, and prints what is known of it, and `more`.

        Raises:
            GateError: The verification failed.
        """
        from kvtool.convert import artifact

        summary, checked = result.to_dict(), None
        table = self._table(str(self.output), result.plan)
        table.add_row("seconds", f"{result.seconds:.1f}")
        table.add_row("peak memory", decimal(result.peak_memory_bytes))
        for name, told in (more or {}).items():
            table.add_row(name, told)
        if self.verify:
            checked = verify_in_fresh_process(self.output, self.checkpoint, quiet=self.quiet)
            summary["verify"] = checked
            if checked["passed"]:
                artifact.record(self.output, checked["measured"])
            for check in checked["checks"]:
                told = f"{result_of(check)}  {check['detail']}"
                table.add_row(f"verify: {check['name']}", told)
        _console.emit(summary, self.json, table)
        if checked is not None and not checked["passed"]:
            raise GateError(
                f"{self.output}: the converted checkpoint failed its verification against "
                f"{self.checkpoint.source}",
                hint="it is kept for inspection; do not use it",
            )

    def _table(self, what: str, plan: dict[str, Any]) -> Table:
        title = f"{self.checkpoint.source} to {plan['to']}: {what}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        _add_plan(table, plan)
        return table


def _add_plan(table: Table, plan: dict[str, Any]) -> None:
    """Rows of what was planned."""
    before, after = plan["bytes_per_token_before"], plan["bytes_per_token_after"]
    if plan["text_of"]:
        told = f"of {plan['text_of']}: what reads images or sound is left out"
        table.add_row("text alone", told)
    if plan["to"] == "mla":
        table.add_row("method", f"{plan['method']} for {plan['target']}")
    told = f"{before:,} before, {after:,} after ({after / before:.1%})"
    table.add_row("cache bytes per token", told)
    if plan["to"] == "mamba":
        told = f"{plan['constant_bytes']:,} of states beside them, at any length"
        table.add_row("bytes per sequence", told)
        replaced = plan["replaced_layers"]  # in words, until they are ranked
        told = replaced if isinstance(replaced, str) else ", ".join(map(str, replaced))
        table.add_row("layers replaced", told)
    elif plan["to"] == "gqa":
        table.add_row("KV heads per layer", str(plan["kv_heads"]))
    elif plan["to"] == "fp8-kv":
        folded = [w for w in ("smooth", "turn_values") if plan[w]]
        each = "layer" if plan["scales"] == "tensor" else "KV head"
        table.add_row("scales", f"one for the keys and one for the values of each {each}")
        table.add_row("folded into weights", ", ".join(folded).replace("_", " ") or "nothing")
        if large := plan["large_key_biases"]:
            times = ", ".join(f"{x:.0f} times in layer {i}" for i, x in large.items())
            told = f"the bias of k_proj is longer than the median's, {times}, which fp8 may break"
            table.add_row("warning", f"{told}; vLLM: {skip_flag(large)}")
    else:
        latent = f"rank {plan['rank']} + {plan['rope_dim']} with positions"
        table.add_row("latent per layer", latent)
    if (healing := plan["healing"]) is not None:
        amount = f"{healing['seconds'] or 0:.0f} seconds"
        if healing["tokens"] is not None:
            amount = f"{healing['tokens']:,} tokens, {healing['steps']:,} steps"
        table.add_row(
            "healing",
            f"{amount}, windows of {healing['window']}, memory about "
            f"{decimal(healing['memory_bytes'])}",
        )
    table.add_row(
        "weights", f"{decimal(plan['output_bytes'])}, attention {plan['attention_dtype']}"
    )


def verify_in_fresh_process(output: Path, against: Checkpoint, *, quiet: bool) -> dict[str, Any]:
    """What ``kvtool verify`` says of *output* in a process that shares nothing with this one."""
    command = [sys.executable, "-m", "kvtool", "verify", str(output), "--json"]
    # The folder, not what the user typed: it is at hand, so no revision and no network are needed.
    command += ["--against", str(against.path)]
    command += ["--quiet"] * quiet + ["--trust-remote-code"] * against.trust_remote_code
    # Under accelerate launch: this one is alone.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
    if done.returncode not in (0, GateError.exit_code):
        raise KvtoolError(
            f"{output}: verification ended with exit code {done.returncode}",
            hint="the reason is printed above; the converted files are complete and kept",
        )
    report: dict[str, Any] = json.loads(done.stdout)
    return report
