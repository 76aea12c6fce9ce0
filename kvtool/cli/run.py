"""``kvtool run``: do what a recipe says, with the same functions as the commands of its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.cli import _console, _options
from kvtool.errors import UsageError

if TYPE_CHECKING:
    from kvtool.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML.")]

recipe_app = typer.Typer(name="recipe", help="Check recipes.", no_args_is_help=True)


def run(
    recipe: RecipeFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the result is written; default: where the recipe says.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: _options.Overwrite = False,
    resume: _options.Resume = True,
    dry_run: _options.DryRun = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Run the steps of RECIPE. With --json every step prints one object."""
    from kvtool.cli.calibrate_budgets import budgets
    from kvtool.cli.calibrate_double_sparsity import double_sparsity
    from kvtool.cli.calibrate_heads import retrieval_heads
    from kvtool.cli.calibrate_projections import projections
    from kvtool.cli.calibrate_quantization import quantization
    from kvtool.cli.calibrate_receptive_field import receptive_field
    from kvtool.cli.calibrate_statistics import statistics
    from kvtool.cli.convert import convert
    from kvtool.cli.evaluate import check_output, evaluate
    from kvtool.cli.verify import verify
    from kvtool.recipe import load_recipe

    calibrations: dict[str, Callable[..., None]] = {
        "calibrate retrieval-heads": retrieval_heads,
        "calibrate budgets": budgets,
        "calibrate projections": projections,
        "calibrate quantization": quantization,
        "calibrate receptive-field": receptive_field,
        "calibrate double-sparsity": double_sparsity,
    }
    composing = (
        *("calibrate quantization", "calibrate receptive-field", "calibrate double-sparsity"),
    )
    silent = ("calibrate statistics", "evaluate", "verify")  # what they write is no result
    loaded = load_recipe(recipe)
    named = {
        i: x.model_dump()["output"] for i, x in enumerate(loaded.steps) if x.uses not in silent
    }
    given = _outputs(recipe, list(named.values()), output, overwrite=overwrite)
    outputs = dict(zip(named, given, strict=True))
    for step in loaded.steps:
        for file in (step.output or ()) if step.uses == "evaluate" else ():
            check_output(Path(file), (".json", ".html"))
    shared: dict[str, Any] = {
        "json": json,
        "quiet": quiet,
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    subject = loaded.model  # or what the last conversion wrote
    plan: Path | None = None  # the last one of the subject
    writing: dict[str, Any] = {"overwrite": overwrite, "revision": loaded.revision}
    for index, step in enumerate(loaded.steps):
        options = {**step.model_dump(exclude={"uses", "output"}), **shared}
        if dry_run and step.uses in ("evaluate", "verify"):
            continue
        missing = subject != loaded.model or (plan is not None and step.uses in composing)
        if dry_run and missing and step.uses != "convert":
            if not quiet:
                why = "what it works with is not written yet, so its result is not foreseen"
                print(f"step {index + 1}, {step.uses}: {why}", file=sys.stderr)
        elif step.uses == "convert":
            made, plan = outputs[index], None
            writing["revision"] = loaded.revision
            convert(loaded.model, made, **options, **writing, resume=resume, dry_run=dry_run)
            subject, writing["revision"] = str(made), None
        elif step.uses == "calibrate statistics":
            statistics(subject, **options, **writing, resume=resume, dry_run=dry_run)
        elif step.uses == "evaluate":
            base = _pinned(loaded, shared)
            judged = base if subject == loaded.model else subject
            reports = [Path(file) for file in step.output or ()]
            evaluate(judged, plan=plan, against=base, output=reports, **options)
        elif step.uses == "verify":
            verify(Path(subject), loaded.model, **options, revision=loaded.revision)
        else:
            if step.uses in composing:
                options["plan"] = plan
            if step.uses == "calibrate retrieval-heads":
                options["resume"] = resume
            plan = outputs[index]
            calibrations[step.uses](subject, plan, **options, **writing, dry_run=dry_run)


def _pinned(recipe: Recipe, shared: dict[str, Any]) -> str:
    """The recipe's model for a command without ``--revision``: the folder of that revision."""
    if recipe.revision is None:
        return recipe.model
    from kvtool.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(
        recipe.model,
        revision=recipe.revision,
        offline=shared["offline"],
        trust_remote_code=shared["trust_remote_code"],
    )
    return str(checkpoint.path)


@recipe_app.command("validate")
def validate(recipe: RecipeFile, json: _options.Json = False) -> None:
    """Check RECIPE against the schema; exit code 3 if it does not follow it.

    With --json, the recipe is printed with the defaults of all that it leaves open.
    """
    from kvtool.recipe import load_recipe

    loaded = load_recipe(recipe)
    if not json:
        typer.echo(f"{recipe}: valid ({', '.join(step.uses for step in loaded.steps)})")
    _console.emit({"recipe": str(recipe), **loaded.model_dump()}, json)


def _outputs(
    recipe: Path, in_recipe: list[str | None], given: Path | None, *, overwrite: bool
) -> list[Path]:
    """The output of every conversion and plan of the recipe.

    Raises:
        UsageError: One is not named, or there already; said now, and not when the steps before it
            are done.
    """
    if given is not None and len(in_recipe) != 1:
        raise UsageError(
            f"{recipe}: has {len(in_recipe)} outputs, so --output cannot name them all"
        )
    named = [Path(name) for name in in_recipe if name is not None] if given is None else [given]
    if twice := [file for i, file in enumerate(named) if file in named[:i]]:
        raise UsageError(f"{recipe}: two steps write {twice[0]}")
    if len(named) < len(in_recipe):
        raise UsageError(
            f"{recipe}: does not say where an output goes",
            hint=f"'kvtool run {recipe} -o OUTPUT' does",
        )
    if not overwrite and (there := [file for file in named if file.exists()]):
        raise UsageError(
            f"The output {there[0]} exists already.", hint="Name another one, or give --overwrite."
        )
    return named
