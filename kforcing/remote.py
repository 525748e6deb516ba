"""Folders in object storage, and their copies on this node.

A place is a path, or a URI (`s3://`, `gs://`, `abfs://`) that `pyarrow.fs` reads and writes; `file://` is a path. The copy
of a URI lies in `~/.cache/kforcing/remote` (or `$XDG_CACHE_HOME`) under a path that spells the URI out, so either can be
computed from the other: `local` and `uri_of`. Programs therefore work on paths, and `fetch` brings a copy up to date.

Endpoint and credentials come from the environment: `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY` and the other sources of the AWS SDK; `GOOGLE_APPLICATION_CREDENTIALS`; Azure's default credentials.
"""

from __future__ import annotations

import functools
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

from filelock import FileLock

from kforcing.model_uri import check_path

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
SMALL = 1 << 20
"""Bytes below which a file is fetched anew each time; a larger one is current while its size and time are its object's."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
"""Ends of the names of files of weights and checkpoints."""
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Longest pauses before a request is tried again, each shortened at random; the AWS SDK retries within each try too."""
SDK_ATTEMPTS = 4
THREADS = 8
OWN = ("lease", "ray_train", "stacks")
"""Folders that belong to one run of a program: they are not fetched."""
_REFUSED = (
    (r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found", "there is no such bucket; make it, or correct the name"),
    (
        r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
        r"|EXPIRED_TOKEN|HTTP status 40[13]",
        "the store refuses these credentials; give ones that may list, read, write and delete there (for S3 "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of this machine)",
    ),
    (
        r"RESOURCE_NOT_FOUND|PERMANENT_REDIRECT|PermanentRedirect|HTTP status (30\d|40[04])",
        "the store cannot take this request; check the bucket, and AWS_ENDPOINT_URL and AWS_REGION where they are set",
    ),
)
"""Signs of an error that trying again does not mend, and what to do about it."""
T = TypeVar("T")


class RemoteError(OSError):
    """An object store refused a request or did not answer; the text is one line that names the URI and the remedy."""


def is_uri(place: str | Path) -> bool:
    """Whether a place is in object storage."""
    return str(place).partition("://")[0] in SCHEMES and "://" in str(place)


def local(place: str | Path) -> Path:
    """The path of a place on this node: a path as it is, and for a URI that of its copy, which need not be there.

    Raises ValueError for a URI without a bucket, with a query, or with `..` in its path.
    """
    scheme, found, rest = str(place).partition("://")
    if not found:
        return Path(place)
    shown = f"{scheme}://{re.sub('^[^/]*@', '***@', rest.partition('?')[0])}"
    if scheme == "file":
        return Path(unquote(rest.removeprefix("localhost")))
    if scheme not in SCHEMES:
        raise ValueError(f"{shown}: {scheme}:// is not known; give a path, or a URI of {', '.join(SCHEMES)} or file")
    check_path(shown)
    bucket, *names = rest.split("/")
    user, at, _ = bucket.rpartition("@")
    if not bucket or "?" in rest or "#" in rest or ":" in user or (at and scheme not in ("abfs", "abfss")):
        raise ValueError(
            f"{shown} is no URI of a folder; write {scheme}://BUCKET/PATH without keys and queries, and give "
            "endpoint and credentials in the environment"
        )
    return Path(_copies(), _store(scheme), bucket, *(name for name in names if name))


def uri_of(path: Path) -> str | None:
    """The URI whose copy has this path; None for other paths."""
    if not path.is_relative_to(_copies()):
        return None
    store, *rest = path.relative_to(_copies()).parts or ("",)
    return f"{store.partition('@')[0]}://{'/'.join(rest)}" if rest else None


def address(path: str | Path) -> str:
    """A path as another node can use it: the URI whose copy it is, or the path itself."""
    return uri_of(Path(path)) or str(path)


def _copies() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "kforcing" / "remote"


def _store(scheme: str) -> str:
    """The folder of a kind of store: buckets of another endpoint are other buckets."""
    _, _, endpoint = _endpoint().partition("://")
    return f"{scheme}@{endpoint.strip('/')}" if scheme == "s3" and endpoint else scheme


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def open_uri(uri: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a URI, and the path in it."""
    scheme, _, rest = uri.partition("://")
    bucket, _, name = rest.partition("/")
    system, base = _file_system(scheme, bucket, _endpoint())
    return system, f"{base}/{name}".rstrip("/")


@functools.lru_cache(maxsize=16)
def _file_system(scheme: str, bucket: str, endpoint: str) -> tuple[Any, str]:
    from pyarrow import fs

    if scheme != "s3":
        system, base = retried(f"{scheme}://{bucket}", lambda: fs.FileSystem.from_uri(f"{scheme}://{bucket}"))
        return system, base.rstrip("/")
    options: dict[str, Any] = {}
    if endpoint:
        kind, _, host = endpoint.rpartition("://")
        options = {"endpoint_override": host.strip("/"), "scheme": kind or "https"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = retried(f"s3://{bucket}", lambda: fs.resolve_s3_region(bucket))
    strategy = fs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS)
    return fs.S3FileSystem(
        region=region, retry_strategy=strategy, connect_timeout=10, request_timeout=60, **options
    ), bucket


def retried(uri: str, call: Callable[[], T]) -> T:
    """What a call returns, which may be tried several times: server errors and timeouts pass.

    Raises:
        RemoteError: when the store refuses it, or still fails after the last of `WAITS_S`.
        OSError: of this node, such as a full disk, and FileNotFoundError for an object that is not there; at once.
    """
    for wait in (*WAITS_S, None):
        try:
            return call()
        except OSError as error:
            if isinstance(error, RemoteError) or error.errno is not None:
                raise
            text = " ".join(str(error).split())[:300]
            if remedy := next((remedy for signs, remedy in _REFUSED if re.search(signs, text)), None):
                raise RemoteError(f"{uri}: {remedy} ({text})") from None
            if wait is None:
                raise RemoteError(
                    f"{uri}: the store does not answer as it should after {len(WAITS_S) + 1} tries; look at its state and at "
                    f"the network, and run the same command again ({text})"
                ) from None
        time.sleep(wait * random.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def listing(uri: str) -> dict[str, Any]:
    """Name below a URI → `pyarrow.fs.FileInfo` of the object; empty where there is none."""
    from pyarrow import fs

    system, root = open_uri(uri)
    found = retried(uri, lambda: system.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True)))
    files = (info for info in found if info.type == fs.FileType.File)
    return {info.path.removeprefix(root).lstrip("/"): info for info in files}


def read_bytes(place: str | Path) -> bytes:
    """The content of a file or an object. Raises FileNotFoundError when it is not there."""
    uri = str(place) if is_uri(place) else uri_of(Path(place))
    if uri is None:
        return local(place).read_bytes()
    system, path = open_uri(uri)

    def read() -> bytes:
        with system.open_input_file(path) as stream:
            return bytes(stream.read())

    return retried(uri, read)


def fetch(place: str | Path, whole: bool = True, without: str | None = None) -> Path:
    """The path of a folder, which is brought up to date with its URI when it is the copy of one.

    Objects that are current are not fetched again. Files that have no object any more are removed, with folders that are
    empty then; hidden ones and those in folders of `OWN` stay. Parquet files are left out: stores of tokens are read over the
    network, by row group. Several processes may call it at once.

    Args:
        whole: False leaves out `WEIGHTS`.
        without: name of a folder in it that is left as it is.
    """
    folder = local(place)
    uri = uri_of(folder)
    if uri is None:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.fetch.lock"):
        objects = {name: info for name, info in listing(uri).items() if _is_fetched(name, without)}
        for file in [file for file in folder.rglob("*") if file.is_file()]:
            name = file.relative_to(folder).as_posix()
            if _is_fetched(name, without) and (name not in objects or not _may_be_current(file, objects[name])):
                file.unlink(missing_ok=True)
        for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            if inner.name not in OWN:
                with suppress(OSError):  # it is not empty
                    inner.rmdir()
        wanted = [name for name in objects if whole or not name.endswith(WEIGHTS)]
        missing = [name for name in wanted if objects[name].size < SMALL or not (folder / name).is_file()]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: _download(f"{uri}/{name}", objects[name], folder / name), missing))
    return folder


def _is_fetched(name: str, without: str | None) -> bool:
    parts = PurePosixPath(name).parts
    return not (name.endswith(".parquet") or any(part.startswith(".") or part in (*OWN, without) for part in parts))


def _may_be_current(file: Path, info: Any) -> bool:
    """Whether a copy has the size and time of its object. Small files are fetched anyway."""
    stat = file.stat()
    return info.size < SMALL or (stat.st_size, int(stat.st_mtime)) == (info.size, info.mtime_ns // 10**9)


def _download(uri: str, info: Any, file: Path) -> None:
    system, path = open_uri(uri)
    check_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        retried(uri, lambda: copy_whole(system, path, None, str(partial), info.size))
        stamp(partial, info)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def copy_whole(source: Any, path: str, destination: Any, target: str, size: int) -> None:
    """Copy a file between file systems of pyarrow (None is this node's), in C++, where no signal can cut it.

    Raises OSError when the copy has another number of bytes.
    """
    from pyarrow import fs

    source, destination = source or fs.LocalFileSystem(), destination or fs.LocalFileSystem()
    fs.copy_files(path, target, source, destination, chunk_size=1 << 23)
    found = destination.get_file_info(target).size
    if found != size:
        raise OSError(f"{target} has {found} bytes after it was copied, and {path} has {size}")


def stamp(file: Path, info: Any) -> None:
    """Give a copy the time of its object."""
    os.utime(file, ns=(info.mtime_ns, info.mtime_ns))
