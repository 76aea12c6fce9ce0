"""Writing an output folder: staging, shards, and the disk they need."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvtool._tensors import INDEX, dtype_name, torch_dtype
from kvtool.errors import CheckpointError, ResourceError, UsageError

if TYPE_CHECKING:
    import torch


class Shaped(Protocol):
    """Shape and safetensors dtype name of a tensor that does not exist yet; `TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


class Staging:
    """The making of one output folder, in `OUT.partial` beside it.

    Args:
        output: The folder to be made.
        key: A hash of everything that determines its content. A partial folder left by a killed run
            with the same key is continued, any other one is wiped.
        overwrite: Replace an existing checkpoint folder, at the very end.
        resume: Continue a partial folder at all.
        source: The folder that is read from, which the output must not touch.

    Attributes:
        path: Where to write the files of the output.
        scratch: Where to keep what only a resumed run needs; not part of the output.

    Raises:
        UsageError: The output exists, cannot be created, overlaps the source, or is being made by
            another process.
    """

    def __init__(
        self,
        output: Path,
        *,
        key: str,
        overwrite: bool = False,
        resume: bool = True,
        source: Path | None = None,
    ) -> None:
        self.output = Path(output).expanduser().resolve()
        self.scratch = scratch_folder(self.output)
        self.path, self._key_file = self.scratch.parent, self.scratch / "key"
        check_output(self.output, overwrite=overwrite, source=source)
        if self.path.exists() and not self._key_file.is_file():
            raise UsageError(
                f"{self.path} is in the way: kvtool works there, and did not write it.",
                hint="Move it, or name another output.",
            )
        try:
            if self.scratch.is_dir():
                self._claim()
            if not (resume and self._key_file.is_file() and self._key_file.read_text() == key):
                if self.path.exists():
                    shutil.rmtree(self.path)
                self.scratch.mkdir(parents=True)
                self._key_file.write_text(key)
                self._claim()
        except OSError as error:
            raise UsageError(f"{self.path} cannot be created: {error.strerror}.") from error

    def _claim(self) -> None:
        """Keeps other processes out of the partial folder until this one ends."""
        self._lock = (self.scratch / "lock").open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UsageError(
                f"Another process is making {self.output}.",
                hint="Wait until it ends, or name another output.",
            ) from error

    def commit(self) -> None:
        """Makes the files durable and renames the partial folder to the output."""
        # From here on nothing may be resumed from, but the folder must still be known as ours.
        self._key_file.write_text("complete")
        for file in self.scratch.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file != self._key_file:
                file.unlink()
        for file in [*self.path.rglob("*"), self.path]:
            _fsync(file)
        aside = None
        if self.output.exists():
            prefix = f".{self.output.name}.old-"
            aside = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
            self.output.rename(aside / "old")
        self.path.rename(self.output)
        _fsync(self.output.parent)
        shutil.rmtree(self.output / self.scratch.name)
        if aside is not None:
            shutil.rmtree(aside)


def scratch_folder(output: Path) -> Path:
    """Where the making of an output keeps what only a resumed run needs."""
    output = Path(output).expanduser().resolve()
    return output.with_name(output.name + ".partial") / ".scratch"


def check_output(output: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Raises UsageError where `output` may not be written; `Staging` asks it too."""
    output = Path(output).expanduser().resolve()
    if source is not None:
        source = source.resolve()
        if output == source or output in source.parents or source in output.parents:
            raise UsageError(
                f"The output {output} and the checkpoint it is made from, {source}, overlap.",
                hint="Checkpoints are never written in place; name another folder.",
            )
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(
            f"The output {output} exists already.", hint="Name another one, or give --overwrite."
        )
    if not output.is_dir() or not ((output / "config.json").is_file() or not any(output.iterdir())):
        raise UsageError(
            f"{output} is not a checkpoint folder, so --overwrite will not replace it.",
            hint="Name another output.",
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one rename: a full disk, or an interruption, leaves what was there before.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    target = path.resolve()  # a link stays one
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        with unfinished.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_disk(folder: Path, needed: int) -> None:
    """Raises ResourceError if the disk of `folder` (which need not exist yet) has less room."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < needed:
        unit, name = (1e9, "GB") if needed >= 1e9 else (1e6, "MB")
        raise ResourceError(
            f"Writing {folder} needs {needed / unit:.2f} {name} of disk, "
            f"but only {free / unit:.2f} {name} are free.",
            hint="Free some space or choose an output on another disk.",
        )


def write_shards(
    staging_path: Path,
    tensors: Mapping[str, Callable[[], torch.Tensor]],
    infos: Mapping[str, Shaped],
    *,
    shard_size: int | str = "2GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors shards, and an index if there is more than one.

    One shard is in memory at a time. Shards that a killed run completed are kept: the staging key
    vouches for their content. The same tensors always give the same bytes.

    Args:
        staging_path: The folder to write into.
        tensors: What makes each tensor, called when its shard is written.
        infos: The shape and dtype each of them will have, from which the shards are planned.
        shard_size: The largest size of a shard, unless a single tensor is larger.
        metadata: Strings for the header of every shard.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(
        {
            n: torch.empty(infos[n].shape, dtype=torch_dtype(infos[n].dtype), device="meta")
            for n in tensors
        },
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        target = staging_path / file
        if target.is_file():
            continue
        shard: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = tensors[name]().detach().to("cpu").contiguous()
            promised, dtype = infos[name], torch_dtype(infos[name].dtype)
            if tuple(tensor.shape) != tuple(promised.shape) or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{name} was planned as {promised.dtype} {list(promised.shape)} "
                    f"but came out as {dtype_name(tensor.dtype)} {list(tensor.shape)}."
                )
            shard[name] = tensor
        unfinished = target.with_suffix(".unfinished")
        save_file(shard, unfinished, metadata={**(metadata or {}), "format": "pt"})
        del shard
        _sort_metadata(unfinished)
        _fsync(unfinished)
        unfinished.rename(target)
    if plan.is_sharded:
        index = {
            "metadata": plan.metadata,
            "weight_map": dict(sorted(plan.tensor_to_filename.items())),
        }
        (staging_path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sort_metadata(file: Path) -> None:
    """Sorts the header's metadata in place: its order varies by process otherwise."""
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"the header of {file} grew when sorted"
        handle.seek(8)
        handle.write(text.ljust(size))


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
