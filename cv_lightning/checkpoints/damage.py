"""Damage check of checkpoints by the checksums in torch's archives, which loading ignores."""

from __future__ import annotations

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_THREADS = 4


def damage(path: Path) -> str:
    """Description of a checkpoint's damage; empty if every record has its checksum. Reads the whole checkpoint.

    Args:
        path: A file of `torch.save` or a DeepSpeed folder. If a file has no checksums, only its table of contents is
            read.
    """
    if not path.exists():
        return "it does not exist"
    if path.is_dir() and not (path / "latest").is_file():
        return "it has no file `latest`, which is written last"
    files = sorted(path.rglob("*.pt")) if path.is_dir() else [path]
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        return next(filter(None, pool.map(_damage_of_file, files)), "")


def _damage_of_file(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            # `torch.serialization.set_crc32_options(False)` writes 0 for all checksums.
            record = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        return f"{file.name} cannot be read ({error}); was it cut short?"
    return f"{file.name}: record {record} is not what was written" if record else ""
