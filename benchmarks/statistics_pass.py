"""What `kvtool calibrate statistics` costs: time beside a bare forward pass, memory at 8B size.

    python benchmarks/statistics_pass.py time [MODEL]
    python benchmarks/shape_8b.py FOLDER                  a random model of 8B shape (16 GB)
    python benchmarks/statistics_pass.py memory FOLDER    what it takes to measure that

Both print one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kvtool.calibrate.statistics import StatisticsOptions, collect, plan
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text


def bare_pass(stream: LayerStream, ids: torch.Tensor) -> Iterator[None]:
    """Every layer with its own attention, and nothing looked at; pauses after each."""
    hidden = stream.embed(ids)
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer), max(1, 2048 // ids.shape[1]))
        del layer
        yield


def measure_time(model: str, tokens: int, window: int, repeats: int) -> dict[str, object]:
    """Seconds per layer of both passes over the same tokens, layer by layer in turn."""
    checkpoint = Checkpoint.open(model)
    options = StatisticsOptions(tokens=tokens, window=window)
    ids = calibration_text().windows(checkpoint.tokenizer(), window, tokens // window)
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "statistics": []}
    for _ in range(repeats):
        bare = bare_pass(LayerStream(checkpoint), ids)
        last = clock()

        def in_turn(stage: str, done: int, total: int) -> None:
            nonlocal last
            if done:
                seconds["statistics"].append(since(last))
                last = clock()
                next(bare)  # noqa: B023 (called within the loop's body)
                seconds["bare"].append(since(last))
            last = clock()

        with tempfile.TemporaryDirectory() as home:
            os.environ["KVTOOL_HOME"] = home
            collect(checkpoint, options, in_turn)
    median = {
        side: [statistics.median(x) for x in zip(*seconds[side], strict=True)] for side in seconds
    }
    return {
        "model": model,
        "tokens": tokens,
        "window": window,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_per_layer": {side: wall for side, (wall, _) in median.items()},
        "cpu_seconds_per_layer": {side: cpu for side, (_, cpu) in median.items()},
        "ratio": median["statistics"][0] / median["bare"][0],
        "cpu_ratio": median["statistics"][1] / median["bare"][1],
    }


def clock() -> tuple[float, float]:
    """Seconds on the wall and of this process; the second bears busy neighbours better."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """What `clock` has advanced."""
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def measure_memory(folder: Path, tokens: int, window: int) -> dict[str, object]:
    """Largest resident memory of this process, which must be fresh."""
    checkpoint = Checkpoint.open(str(folder))
    options = StatisticsOptions(tokens=tokens, window=window)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        os.environ["KVTOOL_HOME"] = home
        planned = plan(checkpoint, options)
        start = time.perf_counter()
        result = collect(checkpoint, options)
        seconds, size = time.perf_counter() - start, result.path.stat().st_size
    return {
        "layers": len(result),
        "tokens": tokens,
        "window": window,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "file_bytes": size,
        "planned_memory_bytes": planned["memory_bytes"],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.what == "time":
        found = measure_time(asked.model, asked.tokens, asked.window, asked.repeats)
    else:
        found = measure_memory(Path(asked.model), asked.tokens, asked.window)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
