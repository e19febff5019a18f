"""Places: local paths and the URIs that fsspec knows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec


def is_remote(place: str | Path) -> bool:
    """Whether a place is a URI of a store other than the local file system.

    >>> is_remote("s3://bucket/x"), is_remote("file:///x"), is_remote("releases")
    (True, False, False)
    """
    return "://" in str(place) and not str(place).startswith("file://")


def local_path(place: str | Path) -> Path:
    """The path of a local place, given as a path or a file:// URI."""
    return Path(str(place).removeprefix("file://"))


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
