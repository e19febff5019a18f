"""Images, resources, cache version, stores: the one place that reads the environment, but for MLflow (_tracking.py)."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from flytekit import Cache, Resources, current_context, task
from flytekit.exceptions.user import FlyteDataNotFoundException
from flytekit.extras.accelerators import A100

from dpldm_core.errors import DpldmError
from dpldm_core.provenance import code_digest

if TYPE_CHECKING:
    from dpldm_core.privacy.ledger import Ledger
    from dpldm_core.rng import SecretKey
    from tasks.artifacts import Release

CPU_IMAGE = "{{.image.cpu.fqn}}:{{.image.cpu.version}}"
GPU_IMAGE = "{{.image.gpu.fqn}}:{{.image.gpu.version}}"
_PROCESS = secrets.token_hex(8)
atexit.register(gc.freeze)  # else Python searches all of torch and MLflow for cycles, two seconds long, before it exits


# retries: a killed stage is paid for: it goes on from its checkpoint, with the same entry and key (docs/decisions/0004)
_CACHED = {"cache": Cache(version=code_digest()[:16])}
SMALL: dict[str, Any] = {
    "container_image": CPU_IMAGE,
    "requests": Resources(cpu="1", mem="2Gi"),
    "limits": Resources(cpu="2", mem="4Gi"),
}
CPU_TASK: dict[str, Any] = {
    "container_image": CPU_IMAGE,
    "requests": Resources(cpu="2", mem="8Gi"),
    "limits": Resources(cpu="4", mem="16Gi"),
    "retries": 2,
    **_CACHED,
}
GPU_TASK: dict[str, Any] = {
    "container_image": GPU_IMAGE,
    "requests": Resources(cpu="4", mem="16Gi", gpu="1"),
    "limits": Resources(cpu="8", mem="32Gi", gpu="1"),
    "accelerator": A100,
    "retries": 2,
    **_CACHED,
}


def dpldm_task(**settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """Flyte's ``task`` whose refusals (DpldmError) pyflyte shows as one message instead of a traceback."""

    def decorate(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except DpldmError as error:
                if isinstance(error, click.ClickException):
                    raise
                shown = type(type(error).__name__, (type(error), click.ClickException), {})
                raise shown(str(error)) from error

        return task(**settings)(run)

    return decorate


def execution_id() -> str:
    """The id of this execution: Flyte's on a cluster; locally, where that is always ``local``, one per process."""
    name = current_context().execution_id.name
    return name if name != "local" else f"local-{_PROCESS}"


def open_ledger() -> Ledger:
    """The ledger at DPLDM_LEDGER_URL, or the default one."""
    from dpldm_core.privacy.ledger import Ledger, default_url

    return Ledger(default_url(os.environ))


def data_root() -> str | None:
    """Folder that already holds MNIST and Fashion-MNIST, from DPLDM_DATA_ROOT."""
    return os.environ.get("DPLDM_DATA_ROOT")


def download_folder() -> str:
    """Where torchvision keeps what it downloads."""
    return str(Path.home() / ".dpldm" / "data")


def inception_weights() -> str | None:
    """File with the Inception weights of FID, from DPLDM_INCEPTION_WEIGHTS."""
    return os.environ.get("DPLDM_INCEPTION_WEIGHTS")


def work_folder(name: str) -> Path:
    """A fresh folder of this task; map tasks share Flyte's own one and would overwrite each other's files."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=current_context().working_directory))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Digest of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StageKeys:
    """The keys of one task's stages; each is handed out when the ledger has its stage, before that reads its data.

    Args:
        release: The release, with its ledger entry.
        data: The private file that the stages are about to read.

    Attributes:
        booked: Stages whose key was asked for.
    """

    def __init__(self, release: Release, data: str | os.PathLike[str]) -> None:
        self._release, self._data = release, data
        self.booked: list[str] = []

    def __call__(self, stage: str) -> SecretKey:
        """The secret key of a stage of the plan, bound to plan, data, settings and code."""
        self.booked.append(stage)
        digests = {
            "data_digest": sha256_of(self._data),
            "plan_digest": self._release.release_plan().digest(),
            "config_digest": self._release.release_config().digest(),
            "code_digest": code_digest(),
        }
        return open_ledger().begin_stage(self._release.entry_id, stage, **digests)


def checkpoint(name: str) -> tuple[Path, Callable[[], None]]:
    """A folder with the checkpoint of the previous attempt, if any, and a function that hands a new one to Flyte.

    Flyte names the previous attempt's place even where that attempt was killed before it saved anything.
    """
    folder = work_folder(f"{name}-checkpoint")
    store = current_context().checkpoint
    if store is None:
        return folder, lambda: None
    try:
        if store.restore(str(folder)) is not None:
            store.save(str(folder))  # the next attempt is told of this one's place alone
    except FlyteDataNotFoundException:
        pass  # from the first step, with the same key
    return folder, lambda: store.save(str(folder))
