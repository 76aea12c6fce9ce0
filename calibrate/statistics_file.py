"""The file of statistics: what it holds of every layer, read one layer at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.calibrate.layer_sums import KINDS, unpack
from kvtool.errors import CalibrationError, UsageError

FORMAT = 2
"""Of the file and of what the numbers in it mean; another one is measured anew."""


@dataclass(frozen=True)
class Summary:
    """Of vectors `[..., W]`: their number, mean, and largest absolute value per channel."""

    tokens: int
    mean: Tensor
    peak: Tensor


@dataclass(frozen=True)
class Moments(Summary):
    """A summary with second moments.

    Attributes:
        second: `[..., W, W]` float64, Σ x xᵀ over the tokens, not centred.
    """

    second: Tensor

    def part(self, start: int) -> Moments:
        """Of the vectors' entries from `start` on, for vectors without leading axes."""
        second = self.second[start:, start:]
        return Moments(self.tokens, self.mean[start:], self.peak[start:], second)

    @property
    def covariance(self) -> Tensor:
        """`[..., W, W]`, second moment about the mean, per token."""
        return self.second / self.tokens - self.mean[..., :, None] * self.mean[..., None, :]


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer with Q query heads, H KV heads, head size D, and K = H·D.

    Moments are over all positions but the sinks; queries and keys are normed (Qwen3). `tokens`
    counts them; means and second moments are float64, peaks float32.

    Attributes:
        queries: `[Q, D]`, before RoPE.
        rotated_queries: `[Q, D]`, after RoPE.
        joint: `[2K]`, keys of all heads before RoPE, then values: [k̂ ; v].
        rotated_keys: `[K]`, keys of all heads after RoPE.
        outputs: `[Q·D]`, what goes into the output projection.
        sinks: The same five by name, over the sink positions, without second moments.
        sink_joint: `[2K]`, of the sinks' [k̂ ; v].
        attended: `[2K, 2K]` float64, second moment of [k̂ ; v] in which a token, sinks too, counts
            by the attention that it gets: Σ_j a_j y_j y_jᵀ, mean over heads and every fourth query.
        distance_mass: `[Q, buckets]` float64, share of the attention by distance: to the token
            itself, to 1, 2-3, 4-7, ... tokens back, and last to sinks, at whatever distance.
        budget_mass: `[H, budgets]` float64, share of the attention of head h's group that the n
            most attended keys of a window hold, for n in `Statistics.budgets`. One choice of keys
            serves all queries looked at (AdaKV, arXiv 2407.11550; PrefixKV, arXiv 2412.03409). Of
            all keys this is 1, and so is the sum of `distance_mass`, but for what sink logits hold.
        eviction_error: Relative change of the attention module's output when only the 32 keys most
            attended in the layer and the last 8 are left (CompressKV, arXiv 2508.02401, whose code
            leaves 24 and 8).
        query_entropy: `[Q]` float64, truncated matrix entropy of the rotated queries of a window
            (UNComp, arXiv 2410.03090, with the D/4 largest singular values).
    """

    queries: Moments
    rotated_queries: Moments
    joint: Moments
    rotated_keys: Moments
    outputs: Moments
    sinks: dict[str, Summary]
    sink_joint: Moments
    attended: Tensor
    distance_mass: Tensor
    budget_mass: Tensor
    eviction_error: float
    query_entropy: Tensor

    @property
    def reach(self) -> Tensor:
        """`[Q]` float64: how many tokens a head typically looks back, but for sinks.

        The geometric mean of distances, as a little attention far away would rule any other; a
        bucket counts as its middle, and 1 is added to all for the token itself.
        """
        mass = self.distance_mass[:, :-1]
        middle = 1.5 * 2.0 ** torch.arange(-1, mass.shape[1] - 1, dtype=torch.float64) - 0.5
        middle[0] = 0
        # A head may look at sinks with all that fp32 holds of its attention: it looks no way back.
        behind = mass.sum(dim=1).clamp(min=torch.finfo(mass.dtype).tiny)
        return ((mass * (1 + middle).log()).sum(dim=1) / behind).exp() - 1

    @property
    def joint_moment(self) -> Tensor:
        """`[2K, 2K]` float64, Σ over all positions, sinks too, of the products of [k̂ ; v]."""
        return self.joint.second + self.sink_joint.second


class Statistics:
    """A statistics file, read one layer at a time.

    Attributes:
        path: The file.
        metadata: `fingerprint` of the model, `options` as used, `corpus`, `windows`, `versions`,
            `layers` and `budgets`.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata

    @classmethod
    def open(cls, path: Path | str) -> Statistics:
        """Reads the header.

        Raises:
            UsageError: There is no such file.
            CalibrationError: It is damaged, or not statistics of this version.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise UsageError(
                f"There are no statistics at {path}.",
                hint="kvtool calibrate statistics MODEL -o FILE writes them",
            )
        try:
            with safe_open(path, "pt") as stored:
                metadata = json.loads((stored.metadata() or {}).get("kvtool", "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(f"{path} is damaged: {error}") from error
        if not isinstance(metadata, dict) or "statistics" not in metadata:
            raise CalibrationError(f"{path} is a safetensors file, but does not hold statistics")
        if metadata["statistics"] != FORMAT:
            raise CalibrationError(
                f"{path} has format {metadata['statistics']}, this kvtool reads {FORMAT}",
                hint="measure again: kvtool calibrate statistics MODEL -o FILE",
            )
        return cls(path, metadata)

    def __len__(self) -> int:
        return int(self.metadata["layers"])

    @property
    def fingerprint(self) -> str:
        """`Checkpoint.fingerprint` of the model they were taken from."""
        return str(self.metadata["fingerprint"])

    @property
    def tokens(self) -> int:
        """Tokens read, sinks included."""
        return int(self.metadata["options"]["tokens"])

    @property
    def budgets(self) -> list[int]:
        """Numbers of keys at which `LayerStatistics.budget_mass` is known, ascending."""
        return list(self.metadata["budgets"])

    def layer(self, index: int) -> LayerStatistics:
        """Reads one layer."""
        prefix = f"layers.{index}."
        try:
            with safe_open(self.path, "pt") as stored:
                names = [n for n in stored.keys() if n.startswith(prefix)]  # noqa: SIM118
                x = {name.removeprefix(prefix): stored.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"{self.path} is damaged: {error}") from error
        at_sinks = int(self.metadata["windows"]) * int(self.metadata["options"]["sinks"])
        elsewhere = self.tokens - at_sinks

        def summary(name: str) -> Summary:
            return Summary(at_sinks, x[f"{name}.mean"], x[f"{name}.peak"])

        def moments(name: str, tokens: int) -> Moments:
            second = unpack(x[f"{name}.second"])
            return Moments(tokens, x[f"{name}.mean"], x[f"{name}.peak"], second)

        return LayerStatistics(
            **{kind: moments(kind, elsewhere) for kind in KINDS},
            sinks={kind: summary(f"sinks.{kind}") for kind in KINDS},
            sink_joint=moments("sinks.joint", at_sinks),
            attended=unpack(x["attended"]),
            distance_mass=x["distance_mass"],
            budget_mass=x["budget_mass"],
            eviction_error=float(x["eviction_error"]),
            query_entropy=x["query_entropy"],
        )


def join(files: dict[str, Path], target: Path, metadata: dict[str, str]) -> None:
    """Writes one safetensors file from several without holding any of their tensors.

    Args:
        files: By the prefix that its tensors' names get.
        metadata: For the header.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    data: list[tuple[Path, int]] = []
    offset = 0
    for prefix, file in files.items():
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            entries = json.loads(handle.read(size))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            header[prefix + name] = {**entry, "data_offsets": [offset + begin, offset + end]}
        data.append((file, 8 + size))
        offset += file.stat().st_size - 8 - size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for file, start in data:
            with file.open("rb") as handle:
                handle.seek(start)
                shutil.copyfileobj(handle, out)
