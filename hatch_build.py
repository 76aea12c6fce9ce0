"""Puts the symbolic links of ``kvtool/`` into the sdist, where the build backend leaves links out.

With them, an unpacked sdist is the same tree as a checkout: its tests run and it installs editable.
"""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LINKS = ("calibrate", "convert", "kernels")


class SdistLinks(BuildHookInterface):
    """Runs when an sdist is finished and adds the links to it."""

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        artifact = Path(artifact_path)
        tar = io.BytesIO(gzip.decompress(artifact.read_bytes()))
        with tarfile.open(fileobj=tar, mode="a") as archive:
            top, _, _ = archive.getnames()[0].partition("/")
            for name in LINKS:
                link = tarfile.TarInfo(f"{top}/kvtool/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, f"../{name}"
                archive.addfile(link)
        # No time stamp, so that the same sources give the same bytes.
        artifact.write_bytes(gzip.compress(tar.getvalue(), mtime=0))
