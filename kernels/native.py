"""Kernels in C: compiled for this processor when they are first used, and kept for later runs.

They lie in `$KVTOOL_HOME/kernels`, by sources, compiler and processor, with a hash of what was made
in the name. Threads are those of torch: its OpenMP is in the process already, so none is linked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from kvtool._home import home
from kvtool.kernels.dispatch import VARIABLE, forced

NAMES = ("decode_attention", "packed_attention")
"""Operations that have a kernel, `NAME/cpu.c` with a function of that name."""

PART = 512
"""Tokens that are read together."""

WIDEST = 640
"""Numbers of a head, or of a latent."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As `attention.h` calls them."""

E4M3 = 3
"""The same for bytes that hold such numbers."""

_FOLDER = Path(__file__).parent
_FLAGS = (
    "-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    f"-DPART={PART}", f"-DWIDEST={WIDEST}",
)  # fmt: skip
_PROCESSOR = ("-march=native", "-mcpu=native", None)  # x86 and ARM; compilers know one or both
_THREADS = ("-fopenmp", None)
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 60  # that one may take


def use_native(*tensors: Tensor) -> bool:
    """Whether a kernel in C runs on these tensors: on a processor, if there is a compiler.

    Raises:
        ValueError: :data:`VARIABLE` wants one, and there is none.
    """
    choice = forced()
    if choice in ("reference", "triton") or any(x.device.type != "cpu" for x in tensors):
        return False
    there = _library() is not None
    if choice == "native" and not there:
        raise ValueError(f"{VARIABLE}=native needs a C compiler, and there is none")
    return there


def compiler() -> str | None:
    """What compiles the kernels: `$CC`, or else a compiler of the system; None if none can."""
    found = _compiler()
    return None if found is None or _library() is None else shlex.join(found)


def library() -> ctypes.CDLL:
    """The kernels, where :func:`use_native` says that there are such."""
    loaded = _library()
    assert loaded is not None
    return loaded


def address(x: Tensor | None) -> int | None:
    """Of its first number."""
    return None if x is None else x.data_ptr()


def learns(*tensors: Tensor | None) -> bool:
    """Whether gradients are wanted, which kernels do not give."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _compiler() -> list[str] | None:
    for name in filter(None, (os.environ.get("CC"), *_COMPILERS)):
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


_lock = threading.Lock()


def _library() -> ctypes.CDLL | None:
    with _lock:  # threads that come at once wait for the one that compiles
        return _found()


@functools.cache
def _found() -> ctypes.CDLL | None:
    command = _compiler()
    if command is None:
        return None
    key, kept = _key(command), None
    try:
        kept = home() / "kernels"
        for file in kept.glob(f"{key}-*.so"):
            if (loaded := _load(file)) is not None:
                return loaded
    except (OSError, RuntimeError):  # a home that cannot be read, or none
        pass
    try:
        made = _build(command, Path(_own_folder().name))
        return None if made is None else _load(_keep(made, key, kept)) or _load(made)
    except OSError:  # nor is there a place for temporary files
        return None


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvtool-kernels-")


def _key(command: list[str]) -> str:
    """What was compiled from these sources, by this compiler, for this processor and torch."""
    key, compiler = hashlib.sha256(), Path(command[0]).stat()
    for source in (_FOLDER / "attention.h", *(_FOLDER / name / "cpu.c" for name in NAMES)):
        key.update(source.read_bytes())
    found = command, compiler.st_size, compiler.st_mtime_ns, _processor(), torch.__version__
    key.update(repr((_FLAGS, found)).encode())
    return key.hexdigest()[:16]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _load(file: Path) -> ctypes.CDLL | None:
    """None if it cannot be, or is not what was written: half a library would end the process."""
    if file.stem.rpartition("-")[2] != _digest(file):
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        for name in NAMES:
            getattr(loaded, name)
    except (OSError, AttributeError):
        return None
    return loaded


def _keep(made: Path, key: str, folder: Path | None) -> Path:
    """Puts it where later runs look for it, if that can be."""
    if folder is None:
        return made
    kept = folder / f"{key}-{_digest(made)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            copy = Path(shutil.copy(made, beside))
            copy.replace(kept)
    except OSError:
        return made
    return kept


def _build(command: list[str], folder: Path) -> Path | None:
    """Compiles with what the compiler can do of threads and of this processor; None if nothing."""
    for threads in _THREADS:
        for processor in _PROCESSOR:
            flags = [*_FLAGS, *(x for x in (threads, processor) if x)]
            try:
                made = _compiled(command, flags, folder)
            except subprocess.TimeoutExpired:
                return None
            if made is not None and _load(made) is not None:
                return made
    return None


def _compiled(command: list[str], flags: list[str], folder: Path) -> Path | None:
    linked, objects = folder / "kernels.so", [folder / f"{name}.o" for name in NAMES]
    for name, made in zip(NAMES, objects, strict=True):
        if not _run(*command, *flags, f"-I{_FOLDER}", "-c", _FOLDER / name / "cpu.c", "-o", made):
            return None
    if not _run(*command, "-shared", *objects, "-o", linked, "-lm"):
        return None
    return linked.rename(folder / f"kernels-{_digest(linked)}.so")


def _run(*command: str | Path) -> bool:
    """Whether it came to a good end.

    Raises:
        subprocess.TimeoutExpired: It came to none; it is stopped with all that it has started.
    """
    nothing = subprocess.DEVNULL
    try:
        running = subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
    except OSError:
        return False
    try:
        return running.wait(_SECONDS) == 0
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        raise


def _processor() -> str:
    """What distinguishes processors that one folder of kernels may serve."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
