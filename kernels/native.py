"""Kernels in C: compiled for this processor when they are first used, and kept for later runs.

They lie in `$KVTOOL_HOME/kernels`, by the content of their sources, the compiler and the processor.
Threads are those of torch: whose OpenMP is in the process already, so none is linked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kvtool._home import home
from kvtool.kernels.dispatch import VARIABLE, forced

_HEADERS = (Path(__file__).parent / "attention.h",)
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_PROCESSOR = ("-march=native", "-mcpu=native", None)  # x86 and ARM; compilers know one or both
_THREADS = ("-fopenmp", None)
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 60  # that one may take

NAMES = ("decode_attention", "packed_attention")
"""Operations that have a kernel."""

PART = 512
"""Tokens that are read together, see `attention.h`."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""As `attention.h` calls them; bytes hold e4m3."""


def use_native(*tensors: Tensor) -> bool:
    """Whether a kernel in C runs on these tensors: on a processor, if there is a compiler.

    Raises:
        ValueError: :data:`VARIABLE` wants one, and there is none.
    """
    choice = forced()
    if choice in ("reference", "triton") or any(x.device.type != "cpu" for x in tensors):
        return False
    there = compiler() is not None
    if choice == "native" and not there:
        raise ValueError(f"{VARIABLE}=native needs a C compiler, and there is none")
    return there


def compiler() -> str | None:
    """The path of a C compiler: `$CC`, or what is called so; None where there is none that can
    compile the kernels.
    """
    return _compiler() if all(_library(name) is not None for name in NAMES) else None


def library(name: str) -> ctypes.CDLL:
    """The kernel `NAME/cpu.c`, where :func:`use_native` says that there are such."""
    loaded = _library(name)
    assert loaded is not None
    return loaded


def address(x: Tensor | None) -> int | None:
    """Of its first number."""
    return None if x is None else x.data_ptr()


@functools.cache
def _compiler() -> str | None:
    names = filter(None, (os.environ.get("CC"), *_COMPILERS))
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    path, source = _compiler(), Path(__file__).parent / name / "cpu.c"
    if path is None:
        return None
    key = hashlib.sha256()
    for part in (*(x.read_bytes() for x in (source, *_HEADERS)), path.encode(), _processor()):
        key.update(part)
    built = f"{name}-{key.hexdigest()[:16]}.so"
    for folder in _folders():
        kept = folder / built
        try:
            if not _loads(kept):
                _build(path, source, kept)
            return ctypes.CDLL(str(kept))
        except OSError:
            continue
    return None


def _folders() -> Iterator[Path]:
    """Where to keep what was compiled: for later runs, or where that cannot be, for this one."""
    try:
        (home() / "kernels").mkdir(parents=True, exist_ok=True)
        yield home() / "kernels"
    except OSError:
        pass
    yield Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvtool-kernels-")


def _build(path: str, source: Path, kept: Path) -> None:
    """Compiles with what the compiler can do of threads and of this processor.

    Raises:
        OSError: It can do nothing of it, or what it made cannot be loaded.
    """
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for threads in _THREADS:
            for processor in _PROCESSOR:
                flags = [*_FLAGS, *(x for x in (threads, processor) if x)]
                compiled = _run(path, *flags, f"-I{source.parents[1]}", "-c", source, "-o", made)
                if compiled and _run(path, "-shared", made, "-o", linked, "-lm") and _loads(linked):
                    linked.replace(kept)
                    return
    raise OSError(f"{path} cannot compile {source}")


def _run(*command: str | Path) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _loads(file: Path) -> bool:
    try:
        ctypes.CDLL(str(file))
    except OSError:
        return False
    return True


def _processor() -> bytes:
    """What distinguishes processors that one folder of kernels may serve."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}".encode()
