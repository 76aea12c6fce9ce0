"""The folder that kvtool keeps for later runs: built-in models, statistics."""

import os
from pathlib import Path


def home() -> Path:
    """`$KVTOOL_HOME`, by default `~/.cache/kvtool`."""
    return Path(os.environ.get("KVTOOL_HOME") or "~/.cache/kvtool").expanduser()
