"""What lies in a converted folder beside the weights: config, manifest, recipe, card, probe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool import __version__, fp8
from kvtool.checkpoint import MANIFEST, Checkpoint, sha256_file, write_shards
from kvtool.convert.options import shard_bytes
from kvtool.corpus import Corpus
from kvtool.errors import CheckpointError, UsageError
from kvtool.progress import Progress
from kvtool.quantised_weights import said_of_weights
from kvtool.recipe import dump_recipe

if TYPE_CHECKING:
    from kvtool.convert.conversion import ConversionResult
    from kvtool.convert.mamba_planning import MambaOptions
    from kvtool.convert.options import ConvertOptions

PROBE = Path("kvtool") / "probe.safetensors"
"""In a folder of its own: some engines load every safetensors file beside the config."""
HEALING = PROBE.with_name("healing.jsonl")
"""The steps of healing and their losses."""

REPLACED = ("q_proj", "k_proj", "v_proj", "rotary_emb")
"""Parts of an attention module that a stock output holds other tensors for."""

_PROBED = 8
"""Positions whose logits are kept: half from the start, half from the end."""


def is_replaced(name: str, parts: list[str]) -> bool:
    """Whether a tensor of the source is one of these parts of an attention module."""
    return any(f".self_attn.{part}." in name for part in parts)


def key_of(models: Sequence[Checkpoint], *more: Any) -> str:
    """Of what an output's bytes depend on: a killed run goes on where all of it is the same.

    Args:
        more: Options and texts, as JSON has them.
    """
    known = [[model.fingerprint(), model.stamps()] for model in models]
    return hashlib.sha256(json.dumps([versions(), known, *more]).encode()).hexdigest()


def write_weights(
    folder: Path,
    tensors: Mapping[str, Callable[[], Tensor]],
    infos: Mapping[str, Any],
    options: ConvertOptions | MambaOptions,
    report: Progress,
) -> None:
    """Writes tensors as shards, made one by one, given their shapes and dtypes."""
    size, made_by = shard_bytes(options.shard_size), {"kvtool_version": __version__}
    report("writing", 0, 1)
    write_shards(folder, tensors, infos, shard_size=size, metadata=made_by)
    report("writing", 1, 1)


def write(
    folder: Path,
    checkpoint: Checkpoint,
    options: ConvertOptions | MambaOptions,
    corpus: Corpus,
    config: dict[str, Any],
    replaced: list[str],
    result: ConversionResult,
) -> None:
    """Writes everything that describes the conversion. Weights and probe are there already.

    Args:
        replaced: Parts of an attention module that are not the source's any more.
    """
    summary = {
        "version": __version__,
        "to": options.to,
        "method": options.method,
        "target": options.target,
        "base": _absolute(checkpoint.source),
        "ranks": result.ranks,
    }
    _write_json(folder / "config.json", {**config, "kvtool": summary})
    step = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    if options.to == "mamba":
        step = {"to": "mamba", **step, "layers": "".join(f"{i}," for i in step["layers"])}
    steps = [{"uses": "convert", **step}]
    recipe = dump_recipe(checkpoint.source, steps, checkpoint.revision)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    manifest = {
        "manifest": 1,
        "base": {"source": _absolute(checkpoint.source), "fingerprint": checkpoint.fingerprint()},
        "method": options.method,
        "target": options.target,
        "options": dataclasses.asdict(options),
        "plan": result.plan,
        "ranks": result.ranks,
        "freqfold": result.freqfold,
        "replaced": replaced,
        "calibration": corpus.id if options.method != "exact" else None,
        "versions": versions(),
        "seconds": round(result.seconds, 1),
        "peak_memory_bytes": result.peak_memory_bytes,
        "sha256": {
            str(file.relative_to(folder)): sha256_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
            and ".scratch" not in file.parts
            # Written after this, and perhaps left by a run that was killed right here.
            and file.relative_to(folder) not in (Path(MANIFEST), Path("README.md"))
        },
        "measured": {},
    }
    if arms := getattr(result, "arms", None):
        manifest |= {"arms": arms, "beaten": getattr(result, "beaten", {})}
    _write_json(folder / MANIFEST, manifest)
    _write_card(folder, manifest)


class _Read(BaseModel):
    model_config = ConfigDict(strict=True)


class _Base(_Read):
    fingerprint: str


class _Planned(_Read):
    attention_dtype: Literal["float32", "bfloat16", "float16"]
    bytes_per_token_after: int
    rope_dim: int | None = None


class _Needed(_Read):
    """What is read of a manifest, whatever else is in it."""

    sha256: dict[str, str]
    base: _Base
    method: str
    target: str
    ranks: list[int]
    replaced: list[str]
    plan: _Planned


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder.

    Raises:
        UsageError: There is no such folder.
        CheckpointError: There is no manifest in it, or a damaged one.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        needed = _Needed.model_validate(manifest)
        if needed.ranks and needed.plan.rope_dim is None:
            raise KeyError("rope_dim")
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, wrong["loc"])) or "all of it"
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: {where}: {wrong['msg'].lower()}"
        ) from error
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not written by kvtool convert"
        ) from None
    except (ValueError, KeyError, RecursionError, OSError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    return manifest


def record(folder: Path, measured: dict[str, Any]) -> None:
    """Puts measured results into the manifest and the card."""
    manifest = read_manifest(folder)
    manifest["measured"] = {**manifest.get("measured", {}), **measured}
    _write_json(folder / MANIFEST, manifest)
    _write_card(folder, manifest)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import transformers

    return {
        "kvtool": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def probe_positions(length: int) -> Tensor:
    """Positions of a probe of `length` tokens whose logits are kept."""
    if length <= _PROBED:
        return torch.arange(length)
    half = _PROBED // 2
    return torch.cat((torch.arange(half), torch.arange(length - half, length)))


def write_probe(folder: Path, ids: Tensor, positions: Tensor, logits: Tensor) -> None:
    """Keeps token ids `[T]`, positions `[P]` and the logits `[P, V]` that are expected there."""
    (folder / PROBE).parent.mkdir(exist_ok=True)
    tensors = {"ids": ids, "positions": positions, "logits": logits.float().contiguous()}
    save_file(tensors, folder / PROBE)


def read_probe(folder: Path) -> dict[str, Tensor]:
    """What `write_probe` kept."""
    try:
        with safe_open(folder / PROBE, "pt") as stored:
            return {name: stored.get_tensor(name) for name in ("ids", "positions", "logits")}
    except Exception as error:
        raise CheckpointError(f"{folder / PROBE} cannot be read: {error}") from error


def reader(file: Path, name: str) -> Callable[[], Tensor]:
    """A function that reads one tensor when it is called."""

    def read() -> Tensor:
        with safe_open(file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
            return tensor

    return read


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_MEASURED = {
    "kl": ("KL(original ‖ converted), nats per token", "{:.3g}"),
    "ppl_base": ("perplexity of the original", "{:.3f}"),
    "ppl": ("perplexity of the converted model", "{:.3f}"),
    "ppl_ratio": ("perplexity ratio", "{:.4f}"),
    "top1_agreement": ("same most likely token", "{:.1%}"),
    "tokens": ("tokens of held-out text", "{}"),
    "bytes_per_token": ("cache bytes per token, allocated by kvtool (bf16)", "{}"),
    "fp8_bytes_per_token": ("cache bytes per token, in fp8", "{}"),
}


_WORDS = {
    "mla": (
        "Multi-head latent attention",
        "converted to MLA",
        [("latent rank + shared RoPE key", "{rank} + {rope_dim}")],
    ),
    "gqa": (
        "Grouped-query attention",
        "with fewer KV heads",
        [("KV heads per layer", "{kv_heads}")],
    ),
    "fp8-kv": (
        "Scales for an fp8 KV cache",
        "with scales for an fp8 cache",
        [
            ("scales per layer, for keys and for values (tensor: one; head: one each)", "{scales}"),
            ("keys smoothed", "{smooth}"),
            ("values turned", "{turn_values}"),
        ],
    ),
    "mamba": (
        "Attention beside Mamba-2",
        "a hybrid",
        [
            ("layers with Mamba-2", "{replaced_layers}"),
            ("constant bytes of a sequence (states in float32)", "{constant_bytes}"),
        ],
    ),
}
_ARMS = {
    "mamba": "this model",
    "random": "control that inherits nothing",
    "pointwise": "control that does not mix tokens",
}


_STOCK = {
    "transformers": "It is a stock `deepseek_v3` checkpoint: transformers loads it without custom "
    "code.",
    "vllm": "It is a stock `deepseek_v3` checkpoint with the conventions of vLLM.",
    "kvtool": "Only kvtool loads it (`kvtool generate`, `kvtool evaluate`).",
}
"""What loads MLA, by target."""


def _loading(folder: Path, manifest: dict[str, Any], to: str, source: str) -> str:
    """What loads a folder, and what that needs."""
    if to == "gqa":
        return f"It is a stock checkpoint of the same class as {source}, with fewer KV heads."
    if to == "mamba":
        return (
            "It is a stock `granitemoehybrid` checkpoint: transformers loads it without custom "
            "code; vLLM should be given `--mamba-ssm-cache-dtype float32`."
        )
    if to != "fp8-kv":
        return _STOCK[manifest["target"]]
    # vLLM does not use scales by itself beside weights of the method fp8.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flagged = said_of_weights(config).get("quant_method") == "fp8"
    flag = "given `--kv-cache-dtype fp8`" if flagged else "without a flag"
    needs = "transformers needs the package compressed-tensors to load it"
    if (folder / fp8.BESIDE).exists():
        needs = f"`{fp8.BESIDE}` says so; transformers passes over it and the scales"
    words = (
        f"It is `{manifest['base']['source']}` with `k_scale` and `v_scale` beside its weights, as "
        f"compressed-tensors names them: vLLM stores the cache in fp8 (e4m3) by them, {flag}. "
        f"{needs}; kvtool leaves the scales aside."
    )
    if layers := manifest["measured"].get("skip_layers"):
        words += f" Some layers lose much: give vLLM `{fp8.skip_flag(layers)}`."
    return words


def _write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """The model card, from the numbers of the manifest alone."""
    plan, measured, base = manifest["plan"], manifest["measured"], manifest["base"]["source"]
    to = plan.get("to", "mla")  # older manifests do not say
    kind, title, rows = _WORDS[to]
    wrapper = plan.get("text_of")
    source = f"`{base}`" if wrapper is None else f"the text of `{base}` ({wrapper}) alone"
    load = _loading(folder, manifest, to, source)
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'kvtool' if manifest['target'] == 'kvtool' else 'transformers'}",
        f"tags: [kvtool, {to}, kv-cache]",
        "---",
        "",
        f"# {Path(base).name}, {title}",
        "",
        f"{kind}, made from {source} by kvtool {manifest['versions']['kvtool']}"
        + ("" if to == "fp8-kv" else f" with the method `{manifest['method']}`")
        + f". {load}",
        "",
        "| | |",
        "|---|---|",
        f"| cache bytes per token before (bf16) | {plan['bytes_per_token_before']} |",
        f"| cache bytes per token after ({'fp8' if to == 'fp8-kv' else 'bf16'}) | "
        f"{plan['bytes_per_token_after']} "
        f"({plan['share']:.1%}) |",
        *(f"| {label} | {form.format(**plan)} |" for label, form in rows),
    ]
    for arm, about in manifest.get("arms", {}).items():
        lines.append(
            f"| {_ARMS[arm]}: KL on held-out text, perplexity ratio | {about['kl']:.3g}, "
            f"{about['perplexity_ratio']:.4f} |"
        )
    learned = manifest.get("arms", {}).get("mamba", {}).get("learned", True)
    if (amount := manifest["options"].get("heal")) is not None and learned:
        teacher = manifest["options"]["teacher"] or base
        lines.append(f"| healed, taught by {teacher} | {amount} |")
    for name, (label, form) in _MEASURED.items():
        if name in measured:
            lines.append(f"| {label} | {form.format(measured[name])} |")
    if not measured:
        lines += ["", "Not verified: `kvtool verify` has not measured it yet."]
    lines += ["", "`recipe.yaml` replays the conversion: `kvtool run recipe.yaml -o OUT`.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
