"""Manifests: a folder is complete if and only if `manifest.json` exists, and it says what every byte should be.

The manifest is written last, when every file is on disk and synced. It holds each file's size, modification time and
XXH3 (128 bits) by block of 16 MiB, so that a partial reader can verify what it reads. XXH3 finds damage, twenty times
as fast as SHA-256; neither guards against somebody who can rewrite the manifest as well.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from checkpoint.files import inside, read_json, sync_folder, write_json
from parallel.errors import InputError

NAME = "manifest.json"
FORMAT = 2
BLOCK = 16 * 2**20
UNCOVERED = frozenset({NAME, "README.md"})
"""Files that no manifest covers; a model card gains its results later."""
DOTTED = frozenset({".metadata"})
"""Covered although hidden: DCP's index."""


def is_complete(folder: Path) -> bool:
    return (folder / NAME).is_file()


def block_hash(block: Any) -> str:
    """Return the checksum of a block of bytes (anything with the buffer protocol)."""
    return xxhash.xxh3_128_hexdigest(block)


def block_hashes(path: Path) -> list[str]:
    """Return the checksum of each block of 16 MiB of a file."""
    hashes = []
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hashes.append(block_hash(block))
    return hashes


def covered(folder: Path) -> list[Path]:
    """Return the files that a manifest of the folder covers, sorted.

    A folder inside that has a manifest of its own is covered by that file alone, which speaks for the rest.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.name not in DOTTED
        if path.is_symlink() or hidden or path.name in UNCOVERED:
            continue
        if path.is_dir():
            found += [path / NAME] if is_complete(path) else covered(path)
        else:
            found.append(path)
    return found


def write_manifest(
    folder: Path, about: Mapping[str, Any] | None = None, known: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """Declare the folder complete: sync and hash all that it covers, then write the manifest.

    Args:
        about: plain data that the manifest carries.
        known: block hashes of files that were hashed already, by name.
    """
    entries = {}
    for path in covered(folder):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        stat = path.stat()
        entries[name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "xxh3": known[name] if known and name in known else block_hashes(path),
        }
        sync_folder(path.parent)
    manifest = {"format": FORMAT, "block": BLOCK, "about": dict(about or {}), "files": entries}
    write_json(folder / NAME, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises:
        InputError: there is none (the folder is incomplete) or it is damaged.
    """
    if not is_complete(folder):
        raise InputError(f"{folder}: incomplete (it has no {NAME})")
    manifest = read_json(folder / NAME)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{folder / NAME}: damaged (it lists no files)")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder / NAME}: of format {manifest.get('format')!r}, this version of growmerge knows {FORMAT}; "
            "its files are as they were: remove it to read them without their checksums"
        )
    return manifest


def check(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Check a folder against its manifest and return the manifest.

    Args:
        deep: read every byte and compare checksums; otherwise sizes and modification times are compared, and only
            a file whose time differs is read.

    Raises:
        InputError: the folder is incomplete, or a file is missing, truncated or has changed: the line names it.
    """
    manifest = read_manifest(folder)
    try:
        _check_files(folder, manifest, deep)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{folder / NAME}: damaged ({error!r})") from error
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any], deep: bool) -> None:
    for name, entry in manifest["files"].items():
        path = inside(folder, name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise InputError(f"{path}: missing, though {NAME} lists it") from None
        if stat.st_size != entry["size"]:
            raise InputError(f"{path}: truncated or changed ({stat.st_size} bytes, {NAME} says {entry['size']})")
        if deep or stat.st_mtime_ns != entry["mtime_ns"]:
            for number, (found, said) in enumerate(zip(block_hashes(path), entry["xxh3"], strict=True)):
                if found != said:
                    raise InputError(f"{path}: damaged (checksum of block {number} differs from {NAME})")
        if path.name == NAME:
            check(path.parent, deep=deep)


def digest(manifest: Mapping[str, Any]) -> str:
    """Return one hash for all files of a manifest: what a folder's content is known by."""
    total = hashlib.sha256()
    for name, entry in sorted(manifest["files"].items()):
        total.update(f"{name}\0{entry['size']}\0{','.join(entry['xxh3'])}\n".encode())
    return total.hexdigest()
