"""Overrides: single fields of a configuration that a file sets, and what is wrong with those that cannot be taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fsspec
import yaml
from pydantic import ValidationError

from dpldm_core.config import ReleaseConfig
from dpldm_core.errors import ConfigError, unknown_name


def load_overrides(path: str) -> dict[str, Any]:
    """Overrides from a JSON or YAML file, local or remote; an empty path gives none.

    Raises:
        ConfigError: The file is missing or holds no mapping.
    """
    if not path:
        return {}
    try:
        with fsspec.open(path, "rt") as file:
            text = file.read()
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config={path!r} cannot be read as JSON or YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config={path!r} must hold a mapping of fields, for example {{seed: 1}}")
    return values


def merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values with single ones replaced, at any depth."""
    merged = dict(values)
    for key, value in overrides.items():
        current = merged.get(key)
        merged[key] = merge(current, value) if isinstance(current, dict) and isinstance(value, Mapping) else value
    return merged


def explain(error: ValidationError) -> str:
    """One line a field: its path, the value and what is allowed; an unknown key comes with the nearest known one."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(str(unknown_name("config key", path, _field_paths())))
        elif problem["type"] == "value_error":  # of several fields together; the message has their values
            lines.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{path}={problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)


def _field_paths() -> list[str]:
    def walk(model: Any, prefix: str) -> list[str]:
        paths = []
        for name, field in model.model_fields.items():
            paths.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                paths += walk(field.annotation, f"{prefix}{name}.")
        return paths

    return walk(ReleaseConfig, "")
