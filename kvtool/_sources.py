"""Where a checkpoint comes from: a folder, the hub, a GGUF file or the built-in model."""

from __future__ import annotations

import re
from pathlib import Path

from kvtool._gguf import builtin_model, materialise
from kvtool._tensors import first_line
from kvtool.errors import CheckpointError, UsageError

BUILTIN_MODEL = "smollm2"
_NAMES = f"A model is a folder, a .gguf file, a hub id (owner/name), or {BUILTIN_MODEL}."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def locate(source: str, revision: str | None, offline: bool, trust_remote_code: bool) -> Path:
    """The folder that `source` means; GGUF files and hub ids are brought into a cache first."""
    if source == BUILTIN_MODEL:
        return builtin_model()
    if not source:  # a path without a name would be the folder that one is in
        raise UsageError("The model is named by nothing: ''.", hint=_NAMES)
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        raise UsageError(f"{source} is not on the hub, so it has no revision {revision}.")
    if path.is_dir():
        return path.absolute()
    if path.is_file() and path.suffix == ".gguf":
        return materialise(path)
    if path.is_file():
        raise UsageError(
            f"{source} is a file, and not a .gguf file.",
            hint="Name the folder that holds the checkpoint.",
        )
    if not _HUB_ID.fullmatch(source) or source.endswith(".gguf") or ".." in source:
        raise UsageError(
            f"There is no checkpoint at {source}.",
            hint=_NAMES,
        )
    return _download(source, revision, offline, trust_remote_code)


def _download(hub_id: str, revision: str | None, offline: bool, trust_remote_code: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    allowed = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
        "*.tiktoken",
        "LICENSE*",
        "NOTICE*",
    ]
    offline = offline or constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*allowed, "*.py"] if trust_remote_code else allowed,
                # Weights of other formats and second copies of the same weights.
                ignore_patterns=["original/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*"],
                local_files_only=offline,
            )
        )
    except GatedRepoError as error:
        raise UsageError(
            f"The hub asks for permission to read {hub_id}.",
            hint=f"Accept its terms on huggingface.co/{hub_id}, then log in with `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"The hub's {hub_id} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no folder {hub_id}, and no such model on the hub that you may read.",
            hint="Check the spelling; for a private model, log in with `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise UsageError(
                f"There is no folder {hub_id}, nor such a hub id in the local cache (offline).",
                hint="Run once without --offline (and HF_HUB_OFFLINE), or name a local folder.",
            ) from error
        raise CheckpointError(
            f"There is no folder {hub_id}, and the hub cannot be reached: {first_line(error)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{hub_id} could not be downloaded: {first_line(error)}") from error
