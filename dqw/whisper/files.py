"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dqw.errors import UserError


def write_atomic(
    path: str | Path, chunks: str | Iterable[bytes], sha256: str | None = None
) -> None:
    """Write `chunks` (or a string as UTF-8) to a temporary name beside `path`, fsync, rename.

    Bytes of a file name that are not UTF-8 are written as \\udcXX, which JSON reads back. Folders
    are made. With `sha256`, bytes with another checksum raise UserError and leave nothing. Devices
    and pipes get the bytes as they come.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(chunks, str):
        chunks = [chunks.encode("utf-8", "backslashreplace")]
    # Others may write it, too; and a longer name than its own could be too long.
    short = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    partial = path.with_name(f".{short}.{os.getpid()}.part")
    if not _replaceable(path):
        with open(path, "ab") as file:
            file.writelines(chunks)
        return
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(f"{path} came out with another sha256 than expected; run it again")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | Path, option: str) -> None:
    """Before long work whose result will be ``path``. Raises UserError, starting with ``option``,
    where it cannot be written; folders are not made."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file.")
    if path.exists() and not _replaceable(path):
        return
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option}: nothing can be written to {folder} ({(error.strerror or '').lower()}); "
            "choose another place."
        ) from None


def _replaceable(path: Path) -> bool:
    """False for /dev/null, a pipe, a folder (which opening it says), and for /dev/stdout, which may
    lead to a file: a rename would put a file into /dev."""
    return path.parent != Path("/dev") and (path.is_file() or not path.exists())
