"""Places: local paths and the URIs that fsspec knows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

_LOCAL = ("file://", "local://")


def is_remote(place: str | Path) -> bool:
    """Whether a place is a URI of a store other than the local file system.

    >>> is_remote("s3://bucket/x"), is_remote("file:///x"), is_remote("local:///x"), is_remote("releases")
    (True, False, False, False)
    """
    return "://" in str(place) and not str(place).startswith(_LOCAL)


def local_path(place: str | Path) -> Path:
    """The path of a local place, given as a path or a file:// URI."""
    return Path(str(place).removeprefix(_LOCAL[0]).removeprefix(_LOCAL[1]))


def scheme_of(uri: str) -> str:
    """The scheme of a URI, by the first of the names that its store goes by.

    >>> scheme_of("s3a://bucket/x"), scheme_of("https://host/x")
    ('s3', 'http')
    """
    scheme = uri.partition("://")[0]
    try:
        names = fsspec.get_filesystem_class(scheme).protocol
    except (ImportError, ValueError):  # nothing can be read from there either
        return scheme
    return names if isinstance(names, str) else str(names[0])


@contextmanager
def local_copy(place: str | Path) -> Iterator[Path]:
    """A file or folder as a local path; a remote one is fetched into a temporary folder that is removed afterwards.

    Raises:
        FileNotFoundError: There is nothing at that place.
        OSError: The store cannot be reached, or a name points outside the folder.
    """
    if not is_remote(place):
        yield local_path(place)
        return
    with tempfile.TemporaryDirectory(prefix="dpldm-") as folder:
        filesystem, root = fsspec.core.url_to_fs(str(place).rstrip("/"))
        names = filesystem.find(root)
        if not names:
            raise FileNotFoundError(f"nothing is stored at {place}")
        top = Path(folder, root.rsplit("/", 1)[-1])
        for name in names:
            inner = name.removeprefix(root).lstrip("/")
            target = top / inner if inner else top
            if ".." in target.parts:
                raise OSError(f"{place} holds a file outside itself: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(name, str(target))
        yield top
