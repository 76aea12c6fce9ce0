"""Is a converted folder still what the conversion meant, and how far is it from the original?

Run in a fresh process. Nothing is taken on trust: files against their hashes, untouched tensors
against the original's bytes, and the logits of the stock model against those that the conversion
had in fp32, on a text longer than 2048 tokens. A swapped row, a wrong RoPE order, a norm that is
not neutral or a wrong scale shows there, however lossy the method is.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from kvtool._transformers import cache_argument, quiet_transformers
from kvtool.checkpoint import Checkpoint, sha256_file
from kvtool.convert import artifact, fp8_kv, granite
from kvtool.divergence import kl_divergence
from kvtool.errors import CheckpointError, KvtoolError
from kvtool.factored import MODEL_TYPE
from kvtool.fp8 import LIMIT, decode, encode, skip_flag, stored_scales
from kvtool.layout import apply_latent_eps, describe
from kvtool.rope import apply_long_factors

PROBE_KL = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-3}
"""Largest mean KL to the conversion's logits, by the dtype that the attention was rounded to."""
EXACT_KL, EXACT_LOGIT = 1e-6, 1e-3
"""What the lossless method must reach against the original in fp32."""
DECODE_KL = 1e-6
LONG = 2048
CLIPPED = 1e-3
"""Largest share of held-out keys or values that a scale for fp8 may be too small for."""
MUCH_WORSE, SEEN = 10, 1e-3
"""A layer in fp8 is to be skipped if it alone costs so many times the median, and so many nats."""
SKETCH = 256
"""Tokens on which layers are tried one by one."""


@dataclass(frozen=True)
class Check:
    """One question, its answer, and the number or file it rests on.

    Attributes:
        judged: Whether it could fail; what is only measured cannot.
    """

    name: str
    passed: bool
    detail: str
    judged: bool = True


@dataclass
class VerifyReport:
    """All checks, and the quality measured on the way."""

    checks: list[Check] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def add(self, name: str, passed: bool, detail: str, judged: bool = True) -> None:
        """Appends a check."""
        self.checks.append(Check(name, passed, detail, judged))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        checks = [vars(check) for check in self.checks]
        return {"passed": self.passed, "checks": checks, "measured": self.measured}


def verify(output: Path, against: Checkpoint, *, long_prompt: bool = True) -> VerifyReport:
    """Checks a converted folder against the model it was made from.

    Args:
        output: What `kvtool convert` wrote.
        against: The original.
        long_prompt: Use the whole probe; without it 512 tokens, and nothing is known beyond those.

    Raises:
        CheckpointError: The folder is not one that kvtool wrote, or cannot be opened at all.
    """
    report = VerifyReport()
    manifest = artifact.read_manifest(output)
    same = manifest["base"]["fingerprint"] == against.fingerprint()
    report.add("base model", same, "the one it was made from" if same else "another model")
    _check_hashes(report, output, manifest)
    converted = Checkpoint.open(str(output))
    _check_untouched(report, converted, against, manifest)

    probe = artifact.read_probe(output)
    ids, positions, expected = probe["ids"], probe["positions"], probe["logits"]
    vocabulary = converted.tensors["model.embed_tokens.weight"].shape[0]
    if not (
        len(ids) > 1
        and 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
        and len(positions)
        and 0 <= int(positions.min()) <= int(positions.max()) < len(ids)
        and expected.shape == (len(positions), vocabulary)
    ):
        raise CheckpointError(f"{output / artifact.PROBE} is no probe of this model")
    if not long_prompt:
        ids = ids[:512]
        expected, positions = expected[positions < 512], positions[positions < 512]
    try:
        logits = _logits(converted, ids)
    except KvtoolError as error:
        report.add("loads", False, str(error))
        return report
    loader = "kvtool" if converted.config["model_type"] == MODEL_TYPE else "stock transformers"
    report.add("loads", True, f"{loader}, no missing and no unexpected tensors")
    finite = bool(torch.isfinite(logits).all())
    report.add("finite", finite, f"logits of {len(ids)} tokens")
    if not finite:
        return report
    _check_probe(report, logits[positions], expected, manifest)
    original = _logits(against, ids)
    if converted.cache_scheme is not None:
        kl = float(_kl(original, logits).mean())
        limit = PROBE_KL[manifest["plan"]["attention_dtype"]]
        report.add("folded", kl <= limit, f"KL {kl:.1e} to the original before any rounding to fp8")
        logits = _check_fp8(report, converted, ids, logits)
    _check_original(report, logits, original, ids, manifest)
    if long_prompt:
        context = int(against.config.get("max_position_embeddings", 0))
        report.add(
            "long prompt",
            len(ids) > LONG or context <= LONG,
            f"{len(ids)} tokens; the model's context is {context}",
        )
    if converted.cache_scheme is None:  # kvtool keeps fp8 by a plan alone
        _check_runtime(report, converted, ids[: min(len(ids), 128)], logits, manifest)
    return report


def _check_hashes(report: VerifyReport, output: Path, manifest: dict[str, Any]) -> None:
    wrong = [
        name
        for name, digest in manifest["sha256"].items()
        if not (output / name).is_file() or sha256_file(output / name) != digest
    ]
    detail = f"{len(manifest['sha256'])} files" if not wrong else f"changed: {', '.join(wrong)}"
    report.add("hashes", not wrong, detail)


def _check_untouched(
    report: VerifyReport, converted: Checkpoint, against: Checkpoint, manifest: dict[str, Any]
) -> None:
    """Everything but the attention projections must be the original's, to the byte."""
    replaced, plan = manifest["replaced"], manifest["plan"]
    gone = {name for name in against.tensors if artifact.is_replaced(name, replaced)}
    if plan.get("to") == "fp8-kv":  # of a wrapper, also what is beside its text
        gone = {against.tensors[name].name for name in gone}
        converted, against = converted.whole(), against.whole()
    shared: dict[str, tuple[str, ...]] = {n: (n,) for n in against.tensors if n not in gone}
    if plan.get("to") == "mamba":
        shared = granite.other_tensors(against.tensors, plan["replaced_layers"])
    elif "lm_head.weight" in converted.tensors:
        shared.setdefault("lm_head.weight", ("model.embed_tokens.weight",))  # untied for vLLM
    different = [
        name
        for name, parts in shared.items()
        if name not in converted.tensors
        or not _same_bytes(converted.read(name), granite.reader(against.read, parts)())
    ]
    detail = f"{len(shared)} tensors, byte for byte"
    if different:
        detail = f"{len(different)} differ: {different[0]}"
    report.add("untouched tensors", not different, detail)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@torch.inference_mode()
def _logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits `[T, V]` fp32 of one forward pass: stock transformers, or our runtime for its own."""
    if checkpoint.config["model_type"] == MODEL_TYPE:
        from kvtool.runtime import Engine

        engine = Engine.load(checkpoint)
        return engine.extend(engine.new_cache(1, len(ids)), ids, all_logits=True)
    model = _stock(checkpoint)
    with quiet_transformers():  # it would tell of packages that make its Mamba-2 layers faster
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    del model
    gc.collect()
    return logits


def _stock(checkpoint: Checkpoint) -> Any:
    """In transformers' own class, with what other engines and kvtool have in another way."""
    model = checkpoint.load_transformers(torch.float32)
    apply_latent_eps(model, checkpoint.config)
    apply_long_factors(model)
    return model


class Fp8Cache(DynamicCache):
    """Of a stock model: gives back what an engine reads from a static fp8 cache.

    Attributes:
        scales: By layer, of keys and values; other layers keep what they are given.
        config: Of the model, where some layers keep something else.
        numbers, clipped: In keys and values so far, and how many were beyond the largest code.
        stored: Bytes of the codes.
    """

    def __init__(self, scales: dict[int, tuple[Tensor, Tensor]], config: Any) -> None:
        super().__init__(config=config)
        self.scales = scales
        self.numbers = self.clipped = self.stored = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Fp8Cache:
        """With the scales that a checkpoint holds for layers with keys and values of their own."""
        config = checkpoint.hf_config()
        own = (i for i, x in enumerate(describe(config)) if x.kind != "state" and x.reads is None)
        return cls({i: stored_scales(checkpoint, i) for i in own}, config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.scales:
            key_scale, value_scale = self.scales[layer_idx]
            key_states = self._through(key_states, key_scale)
            value_states = self._through(value_states, value_scale)
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found

    def _through(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = encode(x, scale)
        self.clipped += int((x.abs() > LIMIT * scale).sum())
        self.numbers += codes.numel()
        self.stored += codes.nbytes
        return decode(codes, scale)


@torch.inference_mode()
def _check_fp8(report: VerifyReport, converted: Checkpoint, ids: Tensor, exact: Tensor) -> Tensor:
    """Scales as they were written, and what they cost; the logits `[T, V]` through fp8."""
    scales = Fp8Cache.of(converted).scales
    wrong = fp8_kv.check_scales(s for pair in scales.values() for s in pair)
    layouts = enumerate(describe(converted.hf_config()))
    readers = {i: layout.reads for i, layout in layouts if layout.reads is not None}
    for i, lender in readers.items():  # an engine reads what that one has stored by its own
        if not all(map(torch.equal, stored_scales(converted, i), scales[lender])):
            wrong = wrong or f"layer {i} has other scales than layer {lender}, which it reads"
    shape = list(next(iter(scales.values()))[0].shape)
    report.add("scales", wrong is None, wrong or f"{2 * len(scales)} of shape {shape}")
    model = _stock(converted)

    def through(chosen: list[int], tokens: Tensor) -> tuple[Tensor, Fp8Cache]:
        cache = Fp8Cache({i: scales[i] for i in chosen}, model.config)
        own = {cache_argument(): cache}
        return model(tokens[None], use_cache=True, **own).logits[0], cache

    logits, cache = through(list(scales), ids)
    clipped = cache.clipped / cache.numbers
    report.add("range", clipped <= CLIPPED, f"{clipped:.1e} of the held-out numbers are clipped")
    report.measured["clipped"] = clipped
    report.measured["fp8_bytes_per_token"] = cache.stored // len(ids)
    few = ids[:SKETCH]
    alone = {i: float(_kl(exact[: len(few)], through([i], few)[0]).mean()) for i in scales}
    median = float(torch.tensor(list(alone.values())).median())
    skip = [i for i, kl in alone.items() if kl > max(MUCH_WORSE * median, SEEN)]
    skip += [i for i, lender in readers.items() if lender in skip]
    report.measured |= {"layer_kl": list(alone.values()), "skip_layers": skip}
    worst = max(scales, key=alone.__getitem__)
    detail = f"layer {worst} alone costs most, KL {alone[worst]:.1e}; the median {median:.1e}"
    report.add("layers", True, f"{detail}; vLLM: {skip_flag(skip)}" if skip else detail)
    return logits


def _check_probe(
    report: VerifyReport, logits: Tensor, expected: Tensor, manifest: dict[str, Any]
) -> None:
    limit = PROBE_KL[manifest["plan"]["attention_dtype"]]
    kl = float(_kl(expected, logits).mean())
    furthest = float((expected - logits).abs().max())
    report.measured["probe_kl"] = kl
    report.add(
        "as converted",
        kl <= limit,
        f"KL {kl:.1e} (at most {limit:.0e}) to the conversion's own logits, largest difference "
        f"{furthest:.1e}",
    )


def _check_original(
    report: VerifyReport, logits: Tensor, base: Tensor, ids: Tensor, manifest: dict[str, Any]
) -> None:
    """How far from the original; a gate only for the lossless method."""
    kl = float(_kl(base, logits).mean())
    losses = [float(_nll(x[:-1], ids[1:])) for x in (base, logits)]
    furthest = float((base - logits).abs().max())
    perplexities = torch.tensor(losses, dtype=torch.float64).exp().tolist()
    report.measured |= {
        "kl": kl,
        "ppl_base": perplexities[0],
        "ppl": perplexities[1],
        "ppl_ratio": perplexities[1] / perplexities[0],
        "top1_agreement": float((base.argmax(-1) == logits.argmax(-1)).float().mean()),
        "tokens": len(ids),
        "max_logit_difference": furthest,
    }
    lossless = manifest["method"] == "exact" and manifest["plan"]["attention_dtype"] == "float32"
    passed = not lossless or (kl <= EXACT_KL and furthest <= EXACT_LOGIT)
    report.add(
        "against the original",
        passed,
        f"KL {kl:.3g}, perplexity {perplexities[0]:.2f} -> {perplexities[1]:.2f} "
        f"(x{perplexities[1] / perplexities[0]:.4f})",
        judged=lossless,
    )


def _check_runtime(
    report: VerifyReport,
    converted: Checkpoint,
    ids: Tensor,
    logits: Tensor,
    manifest: dict[str, Any],
) -> None:
    """Decoding from the cache gives what the whole forward pass gave; and its bytes."""
    from kvtool.runtime import Engine

    engine = Engine.load(converted)
    cache = engine.new_cache(1, len(ids))
    half = len(ids) // 2
    engine.extend(cache, ids[:half])
    steps = torch.stack([engine.decode(cache, token[None])[0] for token in ids[half:]])
    kl = float(_kl(logits[half : len(ids)], steps).mean())
    report.add("decode", kl <= DECODE_KL, f"KL {kl:.1e} between decode and full forward")
    element = torch.finfo(engine.dtype).bits // 8
    short = engine.new_cache(1, len(ids) - half)
    growth = (cache.allocated_bytes - short.allocated_bytes) / half
    measured = int(growth * 2 / element)
    plan, ranks = manifest["plan"], manifest["ranks"]
    planned = plan["bytes_per_token_after"]
    if ranks:  # some layers may need less than was planned
        planned = sum(2 * (rank + plan["rope_dim"]) for rank in ranks)
    report.measured["bytes_per_token"] = measured
    # The runtime also leaves out trailing latent columns that turn out to be zero.
    report.add(
        "cache bytes",
        measured <= planned,
        f"{measured} allocated per token as bf16, {planned} planned",
    )


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference ‖ other) per position `[T]` of logits `[T, V]`, nats, float64."""
    rows = []
    for p, q in zip(reference.split(128), other.split(128), strict=True):
        log_p, log_q = (x.double().log_softmax(dim=-1) for x in (p, q))
        rows.append(kl_divergence(log_p, log_q))
    return torch.cat(rows)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, without a float copy of all logits at once."""
    pairs = zip(logits.split(256), targets.split(256), strict=True)
    parts = [F.cross_entropy(x, wanted, reduction="sum") for x, wanted in pairs]
    return torch.stack(parts).sum() / len(targets)
