"""Training state: the only place that saves and loads it. Resuming is running the same command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dpldm_core.errors import CheckpointError
from dpldm_core.models.ema import Ema


@dataclass
class TrainState:
    """Everything a run needs to go on: random streams are functions of (key, step), so no generator is saved.

    Args:
        step: Logical steps done.
        model: The network being trained.
        ema: Its average.
        optimizer: Adam, or SGD with momentum.
        binding: Digest of plan and data that the run belongs to.
    """

    step: int
    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    binding: str

    def save(self, folder: Path) -> None:
        """Write the state, atomically (a killed write leaves the previous one)."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
        _write(folder / "state.safetensors", tensors, {"step": self.step, "binding": self.binding})

    def restore(self, folder: Path) -> None:
        """Load the state of a previous attempt into this one, if there is any.

        Raises:
            CheckpointError: It is damaged, or belongs to another plan or data set.
        """
        path = folder / "state.safetensors"
        if not path.exists():
            return
        step, tensors = _read(path, self.binding)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.ema.model.load_state_dict(part("ema."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, field = name.split(".", 1)
            state.setdefault(int(index), {})[field] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = step


def save_names(labels: np.ndarray, folder: Path, binding: str) -> None:
    """Write what a first teacher said of synthetic images, int64 [n], atomically, beside the state of the second."""
    _write(folder / "names.safetensors", {"names": torch.from_numpy(labels)}, {"step": 0, "binding": binding})


def load_names(folder: Path, binding: str) -> np.ndarray | None:
    """What :func:`save_names` wrote, or None when there is nothing.

    Raises:
        CheckpointError: It is damaged, or belongs to another plan or data set.
    """
    path = folder / "names.safetensors"
    return _read(path, binding)[1]["names"].numpy() if path.exists() else None


def _write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, int | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    metadata = {"dpldm": json.dumps(header)}
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, metadata=metadata)
    partial.rename(path)


def _read(path: Path, expected: str) -> tuple[int, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["dpldm"])
            step, binding = int(header["step"]), str(header["binding"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if binding != expected:
        raise CheckpointError(
            f"checkpoint {path} belongs to another plan or data set; resuming it here would charge "
            "the wrong events. Remove it to start this stage anew"
        )
    return step, tensors


def save_model(model: nn.Module, path: Path) -> None:
    """Weights and buffers as safetensors."""
    save_file({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, path)


def load_model(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_model` wrote, strictly.

    Raises:
        CheckpointError: The file is damaged or of another architecture.
    """
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:
        raise CheckpointError(f"model file {path} does not fit this configuration: {error}") from error
