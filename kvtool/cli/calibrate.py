"""``kvtool calibrate``: find out where a model's cache may lose bytes; write it down as a plan."""

import typer

from kvtool.cli.calibrate_budgets import budgets
from kvtool.cli.calibrate_double_sparsity import double_sparsity
from kvtool.cli.calibrate_explain import explain
from kvtool.cli.calibrate_heads import compare_heads, retrieval_heads
from kvtool.cli.calibrate_layers import layer_importance
from kvtool.cli.calibrate_projections import projections
from kvtool.cli.calibrate_quantization import quantization
from kvtool.cli.calibrate_receptive_field import receptive_field
from kvtool.cli.calibrate_statistics import statistics

calibrate_app = typer.Typer(
    name="calibrate",
    help="Measure a model, and plan where its cache may lose bytes.",
    no_args_is_help=True,
)
calibrate_app.command("retrieval-heads")(retrieval_heads)
calibrate_app.command("budgets")(budgets)
calibrate_app.command("projections")(projections)
calibrate_app.command("quantization")(quantization)
calibrate_app.command("double-sparsity")(double_sparsity)
calibrate_app.command("receptive-field")(receptive_field)
calibrate_app.command("statistics")(statistics)
calibrate_app.command("layer-importance")(layer_importance)
calibrate_app.command("compare-heads")(compare_heads)
calibrate_app.command("explain")(explain)
