"""Is a checkpoint what was written? torch's archives hold a checksum of every record, which loading ignores."""

from __future__ import annotations

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_THREADS = 4
BLOCK_BYTES = 4 << 20
ERRORS = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty where every record is as it was written. Reads all of it.

    Args:
        path: a file of `torch.save`, or a folder of DeepSpeed. Of files without checksums only the table of contents
            is read.
    """
    if not path.exists():
        return "it is not there"
    if path.is_dir() and not (path / "latest").is_file():
        return "it has no file `latest`, which is written last"
    files = sorted(path.rglob("*.pt")) if path.is_dir() else [path]
    records = []
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except ERRORS as error:
            return f"{file.name} cannot be read ({error}); was it cut short?"
        if any(info.CRC for info in infos):  # without checksums, as `set_crc32_options(False)` writes, all are 0
            records += [(file, info) for info in infos]
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        return next(filter(None, pool.map(lambda record: _check(*record), records)), "")


def _check(file: Path, info: zipfile.ZipInfo) -> str:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as record:
            while record.read(BLOCK_BYTES):
                pass
    except ERRORS as error:
        return f"{file.name}: record {info.filename} is not what was written ({error})"
    return ""
