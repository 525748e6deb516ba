"""Which files a corpus consists of: one rule for paths, globs and URIs, and a reason for every file that is left out."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from pyarrow import fs

from pipelines.config.section import ConfigError

_CORPORA = Path(__file__).parent / "corpora"
CHAT = "smollm2-chat"
BUILTIN = {"sotu": _CORPORA / "sotu.parquet", CHAT: _CORPORA / "smollm2-chat.parquet"}
SELF = "self"
"""The source of text that the AR model writes itself."""
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_NOT_A_CORPUS = (
    "with another suffix than .parquet, .jsonl, .json and .txt (.gz, .zst or .bz2 may follow all but the first)"
)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    source: str
    system: fs.FileSystem
    kind: str
    """`parquet`, `json` (lines) or `text`."""
    files: tuple[fs.FileInfo, ...]
    """What is read, sorted by path."""
    skipped: dict[str, str]
    """Path → why the file is not read."""

    def __str__(self) -> str:
        size = sum(file.size for file in self.files)
        return f"{self.source}: {len(self.files)} {self.kind} files, {size:,} bytes{_account(self.skipped)}"


def cut(text: object, limit: int = 300) -> str:
    """The beginning of a text that another library wrote, for an error message."""
    return str(text)[:limit]


def is_remote(source: str) -> bool:
    """Whether the source is read over a network. Such a source is checked on the cluster only."""
    return source.startswith("hf:") or source == SELF or ("://" in source and not source.startswith("file://"))


def list_files(source: str) -> Listing:
    """The files behind a path, a glob or a URI; folders are searched through.

    Left out are files that are hidden or temporary (a name below the given folder begins with `.` or `_`), empty, or of no
    kind that a corpus can have. Raises ConfigError when nothing is left, or files of several kinds are.
    """
    try:
        system, root, found = _find(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.source={source} cannot be listed ({cut(error)}); check the name, and that this machine reaches it"
        ) from None
    reasons = {info.path: reason for info in found if (reason := _reason_to_skip(info, root))}
    files = tuple(sorted((info for info in found if info.path not in reasons), key=lambda info: info.path))
    if not files:
        raise ConfigError(
            f"data.source={source}: no .parquet, .jsonl, .json or .txt file there{_account(reasons)}. Give an existing file, "
            f"folder or glob, `hf:NAME` for a `datasets` corpus, or one of the built-in corpora: {', '.join(BUILTIN)}"
        )
    kinds = {kind_of(file.path) or "": file.path for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.source={source} mixes file types, such as {' and '.join(kinds.values())}; give a glob that selects one, "
            f"like {source}/*.parquet"
        )
    return Listing(source, system, next(iter(kinds)), files, reasons)


def kind_of(path: str) -> str | None:
    """`parquet`, `json` or `text` by the file's name, in any case; None for other files."""
    name = PurePosixPath(path.lower())
    if compression_of(path) is None:
        return KINDS.get(name.suffix)
    kind = KINDS.get(PurePosixPath(name.stem).suffix)
    return None if kind == "parquet" else kind


def compression_of(path: str) -> str | None:
    """Arrow's name of the compression that a file's name shows."""
    return COMPRESSIONS.get(PurePosixPath(path.lower()).suffix)


def _find(source: str) -> tuple[fs.FileSystem, str, list[fs.FileInfo]]:
    """File system, folder that is searched, and everything in it that is not a folder."""
    if is_remote(source):
        system, root = fs.FileSystem.from_uri(source)
    else:
        local = re.sub("^file://(localhost)?", "", source)
        path = Path(BUILTIN.get(source, unquote(local) if local != source else source)).expanduser().absolute()
        system, root = fs.LocalFileSystem(), str(path)
        if not path.exists():
            matches = glob.glob(root, recursive=True)
            return system, re.split(r"[*?[]", root)[0].rpartition("/")[0], _not_folders(system.get_file_info(matches))
    info = system.get_file_info(root)
    if info.type == fs.FileType.Directory:
        below = fs.FileSelector(root, recursive=True) if is_remote(source) else list(_local_files(root))
        return system, root, _not_folders(system.get_file_info(below))
    return system, root.rpartition("/")[0], [] if info.type == fs.FileType.NotFound else [info]


def _local_files(root: str) -> Iterator[str]:
    """Paths of all files below a folder and below links to folders, once, with links that lead nowhere."""
    seen = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.join(folder, name) for name in names)


def _not_folders(found: list[fs.FileInfo]) -> list[fs.FileInfo]:
    return [info for info in found if info.type != fs.FileType.Directory]


def _reason_to_skip(info: fs.FileInfo, root: str) -> str | None:
    below = PurePosixPath(info.path).relative_to(root).parts
    if any(part.startswith((".", "_")) for part in below):
        return "hidden or temporary"
    if kind_of(info.path) is None:
        return _NOT_A_CORPUS
    if info.type != fs.FileType.File:
        return "no regular file, or a link that leads nowhere"
    return None if info.size else "empty"


def _account(reasons: dict[str, str]) -> str:
    """How many files are skipped, why, and the names of some."""
    if not reasons:
        return ""
    parts = []
    for reason, count in Counter(reasons.values()).items():
        names = [path for path, why in reasons.items() if why == reason][:_NAMES_SHOWN]
        parts.append(f"{count} {reason}: {', '.join(names)}{', …' if count > len(names) else ''}")
    return f"; {len(reasons)} files skipped: {'; '.join(parts)}"
