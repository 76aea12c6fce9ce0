"""The command line. Importing it imports neither torch nor transformers, so help is instant."""

import errno
import importlib.metadata
import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from kvtool import __version__
from kvtool.cli import (
    bench,
    calibrate,
    chat,
    compare,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    plan,
    run,
    serve,
    verify,
)
from kvtool.errors import KvtoolError, ResourceError, UsageError

_EXIT_INTERRUPTED = 130
_LONGEST = 1500
"""Characters of an error that are shown: all but of those that quote what is absurd."""

app = typer.Typer(
    name="kvtool",
    help="Smaller KV caches for ordinary language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    inspect.inspect,
    convert.convert,
    verify.verify,
    evaluate.evaluate,
    compare.compare,
    bench.bench,
    generate.generate,
    chat.chat,
    run.run,
    doctor.doctor,
):
    app.command()(_command)
app.command("serve-local")(serve.serve_local)
for _group in (calibrate.calibrate_app, plan.plan_app, run.recipe_app):
    app.add_typer(_group)


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"kvtool {__version__}")
    for package in ("torch", "transformers", "triton"):
        try:
            typer.echo(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo(f"{package} not installed")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions of kvtool, torch, transformers and triton.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and ends the process with the exit code that says how it went."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it: nobody wants to know
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    # Tables are drawn in characters that a terminal may lack; names of files may be no Unicode.
    if isinstance(sys.stdout, TextIOWrapper):
        unicode = sys.stdout.encoding.lower() == "utf-8"
        if sys.stdout.errors in ("strict", "strict" if unicode else "surrogateescape"):
            sys.stdout.reconfigure(errors="replace")
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command; errors meant for the user become two lines on stderr and an exit code."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # Both libraries would otherwise write control codes into logs and pipes.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(arguments, prog_name="kvtool", standalone_mode=False)
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    except Abort:
        return 1
    except TyperException as error:
        # Asked for nothing, typer has printed the help by now and has nothing to add.
        return _report(_usage_error(error)) if str(error) else UsageError.exit_code
    except KvtoolError as error:
        return _report(error)
    except (MemoryError, RuntimeError) as error:
        where = _ran_out(error)
        if where is None:
            raise
        return _report(ResourceError(f"the {where} ran out of memory"))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _report(ResourceError(f"the disk is full: {error}"))
        return _report(KvtoolError(str(error)))
    if code == _EXIT_INTERRUPTED:
        resumable = arguments[0] == "convert" or arguments[:2] == ["calibrate", "statistics"]
        scoring = {"attention", "semantic", "entropy"}  # which take a minute, and start anew
        resumable |= arguments[:2] == ["calibrate", "retrieval-heads"] and not (
            scoring & {argument.removeprefix("--method=") for argument in arguments}
        )
        resumes = resumable and "--no-resume" not in arguments
        goes_on = "; the same command goes on where it stopped" if resumes else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _ran_out(error: MemoryError | RuntimeError) -> str | None:
    """What ran out of memory; None where the error says something else."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    # On the CPU torch raises a plain RuntimeError.
    said = ("not enough memory", "can't allocate memory")
    exhausted = isinstance(error, MemoryError) or any(part in str(error) for part in said)
    return "machine" if exhausted else None


def _usage_error(error: TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvtool"
    message = error.format_message().replace("Value error, ", "")  # which pydantic puts in front
    message = " ".join(message.split())  # choices come one a line
    return UsageError(message, hint=f"'{command} --help' lists what is accepted")


def _report(error: KvtoolError) -> int:
    if os.environ.get("KVTOOL_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {_line(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {_line(error.hint)}", file=sys.stderr)
    return error.exit_code


def _line(text: str) -> str:
    """A message as one line of no more than a paragraph, whatever it quotes of a file: without
    line breaks and codes that a terminal obeys, and without the middle of what is long.
    """
    text = "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
