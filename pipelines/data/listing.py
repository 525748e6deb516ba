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

from kforcing.remote import open_uri
from pipelines.config.section import ConfigError
from pipelines.log import without_passwords

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
_HIDDEN = "hidden or temporary"
_TWICE = "the same file as another that is read, through a link"
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
    """Path → why the file, or the folder with all that is in it, is not read."""

    def __str__(self) -> str:
        size = sum(file.size for file in self.files)
        shown = without_passwords(self.source)
        return f"{shown}: {len(self.files)} {self.kind} files, {size:,} bytes{_account(self.skipped)}"


def cut(text: object, limit: int = 300) -> str:
    """The beginning of a text that another library wrote, for an error message."""
    return str(text)[:limit]


def is_remote(source: str) -> bool:
    """Whether the source is read over a network. Such a source is checked on the cluster only."""
    return source.startswith("hf:") or source == SELF or ("://" in source and not source.startswith("file://"))


def list_files(source: str) -> Listing:
    """The files behind a path, a glob or a URI; folders are searched through.

    Left out are files that are hidden or temporary (a name below the given folder begins with `.` or `_`), empty, of no kind
    that a corpus can have, or links to a file that is read already, and folders that cannot be read. Raises ConfigError when
    nothing is left, or files of several kinds are.
    """
    shown = without_passwords(source)
    try:
        system, root, found, reasons = _find(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.source={shown} cannot be listed ({cut(without_passwords(str(error)))}); check the name, and that this "
            "machine reaches it"
        ) from None
    reasons |= {info.path: reason for info in found if (reason := _reason_to_skip(info, root))}
    if isinstance(system, fs.LocalFileSystem):
        reasons |= _read_twice([info.path for info in found if info.path not in reasons])
    files = tuple(sorted((info for info in found if info.path not in reasons), key=lambda info: info.path))
    if not files:
        raise ConfigError(
            f"data.source={shown}: no .parquet, .jsonl, .json or .txt file there{_account(reasons)}. Give an existing file, "
            f"folder or glob, `hf:NAME` for a `datasets` corpus, or one of the built-in corpora: {', '.join(BUILTIN)}"
        )
    kinds = {kind_of(file.path) or "": file.path for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.source={shown} mixes file types, such as {' and '.join(kinds.values())}; give a glob that selects one, "
            f"like {shown}/*.parquet"
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


def _find(source: str) -> tuple[fs.FileSystem, str, list[fs.FileInfo], dict[str, str]]:
    """File system, the path that was given, everything below it that is not a folder, and why folders were left out."""
    skipped: dict[str, str] = {}
    if is_remote(source):
        system, root = open_uri(unquote(source)) if re.match("s3://[^?@]*$", source) else fs.FileSystem.from_uri(source)
        if "*" in root:
            base = root.partition("*")[0].rpartition("/")[0]
            below = _not_folders(system.get_file_info(fs.FileSelector(base, recursive=True)))
            return system, base, [info for info in below if PurePosixPath(info.path).match(root)], skipped
    else:
        local = re.sub("^file://(localhost)?", "", source)
        path = Path(BUILTIN.get(source, unquote(local) if local != source else source)).expanduser().absolute()
        system, root = fs.LocalFileSystem(), str(path)
        if not path.exists():
            matches = _not_folders(system.get_file_info(glob.glob(root, recursive=True)))
            return system, re.split(r"[*?[]", root)[0].rpartition("/")[0], matches, skipped
    info = system.get_file_info(root)
    if info.type == fs.FileType.Directory:
        inside = fs.FileSelector(root, recursive=True) if is_remote(source) else list(_local_files(root, skipped))
        return system, root, _not_folders(system.get_file_info(inside)), skipped
    return system, root, [] if info.type == fs.FileType.NotFound else [info], skipped


def _local_files(root: str, skipped: dict[str, str]) -> Iterator[str]:
    """Paths of all files below a folder and below links to folders, with links that lead nowhere; each folder is read once.

    Folders that are hidden or cannot be read are noted in `skipped`.
    """
    seen = set()

    def skip(error: OSError) -> None:
        skipped[error.filename] = f"a folder that cannot be read ({error.strerror})"

    for folder, folders, names in os.walk(root, onerror=skip, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        skipped |= {os.path.join(folder, name): _HIDDEN for name in folders if _is_hidden(name)}
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (os.path.join(folder, name) for name in names)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _read_twice(paths: list[str]) -> dict[str, str]:
    """The paths that lead to the file of another one, with the reason. A file's own name counts before a link's."""
    seen: set[str] = set()
    again = {}
    for path in sorted(paths, key=lambda path: (os.path.islink(path), path.count("/"), path)):
        if (real := os.path.realpath(path)) in seen:
            again[path] = _TWICE
        seen.add(real)
    return again


def _not_folders(found: list[fs.FileInfo]) -> list[fs.FileInfo]:
    return [info for info in found if info.type != fs.FileType.Directory]


def _reason_to_skip(info: fs.FileInfo, root: str) -> str | None:
    below = PurePosixPath(info.path).relative_to(root).parts
    if any(map(_is_hidden, below)):
        return _HIDDEN
    if kind_of(info.path) is None:
        return _NOT_A_CORPUS
    if info.type != fs.FileType.File:
        return "no regular file, or a link that leads nowhere"
    return None if info.size else "empty"


def _account(reasons: dict[str, str]) -> str:
    """How many files and folders are skipped, why, and the names of some."""
    if not reasons:
        return ""
    parts = []
    for reason, count in Counter(reasons.values()).items():
        names = [path for path, why in reasons.items() if why == reason][:_NAMES_SHOWN]
        parts.append(f"{count} {reason}: {', '.join(names)}{', …' if count > len(names) else ''}")
    return f"; {len(reasons)} skipped: {'; '.join(parts)}"
