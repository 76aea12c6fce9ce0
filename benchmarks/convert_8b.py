"""What `kvtool convert` costs at 8B size: memory, and time layer by layer.

    python benchmarks/convert_8b.py [FOLDER]

Writes `results/convert-8b-shape.json`. Checkpoints of random weights (see `shape_8b.py`) are made
once in FOLDER and stay there; without it they are made where temporary files are, and removed. Each
is converted in a process of its own, which finds no statistics. With 4 and 8 layers, 20 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvtool.evaluate.throughput import environment

HERE = Path(__file__).parent
CONVERT = ["convert", "--to", "mla", "--method", "aware", "--kv-budget", "50%", "--no-verify"]


def python(*words: str, **variables: str) -> str:
    """What this Python prints, run in a fresh process.

    Linux starts the peak memory of a process at that of its parent: nothing large is done in here.
    """
    command, environ = [sys.executable, *words], os.environ | variables
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measure(folder: Path, layers: int, shrink: int, tokens: int) -> dict[str, Any]:
    """Converts the checkpoint with this many layers; nothing is left but the checkpoint."""
    source = folder / f"{layers}-layers"
    if not (source / "model.safetensors.index.json").is_file():  # the last file to be written
        shape = ("--layers", str(layers), "--shrink", str(shrink))
        python(str(HERE / "shape_8b.py"), str(source), *shape)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        words = [*CONVERT, "--tokens", str(tokens), str(source), "-o", f"{work}/mla"]
        words += ["--quiet", "--json"]
        result = json.loads(python("-m", "kvtool", *words, KVTOOL_HOME=f"{work}/home"))
        output_bytes = weight_bytes(Path(work, "mla"))
    return {
        "layers": layers,
        "seconds": result["seconds"],
        "seconds_per_layer": result["seconds"] / layers,
        "peak_memory_bytes": result["peak_memory_bytes"],
        "source_bytes": weight_bytes(source),
        "output_bytes": output_bytes,
        "plan": result["plan"],
    }


def weight_bytes(folder: Path) -> int:
    """Size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def further_layer(runs: list[dict[str, Any]], number: str) -> float | None:
    """What one layer more adds to a number, between the smallest and the largest model."""
    first, last = (pick(runs, key=lambda run: run["layers"]) for pick in (min, max))
    more = last["layers"] - first["layers"]
    return (last[number] - first[number]) / more if more else None


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--shrink", type=int, default=1, help="divides the widths, for a trial")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    results = HERE / "results" / "convert-8b-shape.json"
    parser.add_argument("-o", "--output", type=Path, default=results)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [measure(folder, layers, asked.shrink, asked.tokens) for layers in asked.layers]
    found = {
        "environment": environment(torch.device("cpu"), torch.bfloat16),
        "convert": " ".join(["kvtool", *CONVERT]),
        "shrink": asked.shrink,
        "tokens": asked.tokens,
        "runs": runs,
        "seconds_per_further_layer": further_layer(runs, "seconds"),
        "memory_bytes_per_further_layer": further_layer(runs, "peak_memory_bytes"),
    }
    asked.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
