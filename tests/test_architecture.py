"""Who may import whom (STYLE: layout). Anything else is a failing test, not a habit."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for room in ("dpldm_core", "tasks", "workflows") for p in (ROOT / room).rglob("*.py"))
GROUND = ("errors", "rng", "config", "overrides", "presets", "provenance", "storage", "threads")
# Inside core, low to high; what a room may import besides itself and the ground floor.
ALLOWED = {
    "data": (),
    "privacy": (),
    "models": (),
    "diffusion": (),
    "evaluation": ("models",),
    "training": ("data", "privacy", "models", "diffusion"),
    "release": ("data", "privacy", "models", "diffusion", "training", "evaluation"),
}
ONLY_HERE = {
    "mlflow": {"tasks/_tracking.py"},
    "dp_accounting": {"dpldm_core/privacy/accounting.py"},
    "opacus": {"dpldm_core/privacy/opacus_backend.py"},
    "sqlalchemy": {"dpldm_core/privacy/chain.py"},
}
HEAVY = ("torch", "torchvision", "opacus", "dp_accounting", "mlflow", "scipy", "sklearn", "pandas", "matplotlib")


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path, *, top_level_only=False):
    """Full names of everything that a file imports, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test)
        for n in ast.walk(b)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts(module, *prefixes):
    return any(module == p or module.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    room, *inner = path.relative_to(ROOT).parts
    for module in imports(path):
        if room == "workflows":
            core = starts(module, "dpldm_core") and not starts(module, "dpldm_core.config", "dpldm_core.presets")
            assert not core and not starts(module, *HEAVY), f"workflows compose only, but import {module}"
        if room == "tasks":
            assert not starts(module, "workflows"), module
            private = ("tasks._closing", "tasks._resources", "tasks._tracking", "tasks.artifacts")
            assert not starts(module, "tasks") or starts(module, *private), f"a task imports another: {module}"
        if room == "dpldm_core":
            assert not starts(module, "flytekit", "mlflow", "tasks", "workflows"), module
            if len(inner) > 1 and starts(module, "dpldm_core"):
                target = module.split(".")[1]
                assert target in (inner[0], *GROUND, *ALLOWED[inner[0]]), f"{inner[0]} imports {module}"
            if len(inner) == 1 and starts(module, "dpldm_core"):
                assert module.split(".")[1] in GROUND, f"the ground floor imports {module}"
        for library, files in ONLY_HERE.items():
            if starts(module, library):
                assert name(path) in files, f"{library} is imported outside {files}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] in ("tasks", "workflows")], ids=name)
def test_nothing_heavy_at_module_level(path):
    """pyflyte imports these files to print --help."""
    assert not [m for m in imports(path, top_level_only=True) if starts(m, *HEAVY)]


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] != "tasks" and p.name != "ledger_cli.py"], ids=name)
def test_only_tasks_and_the_command_line_read_the_environment(path):
    assert "os.environ" not in path.read_text() and "getenv" not in path.read_text()


def test_importing_the_library_and_the_workflows_loads_nothing_heavy():
    code = f"import sys, dpldm_core, workflows.release; print([m for m in {HEAVY[:7]!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_layout_that_pyflyte_needs():
    """pyflyte takes the first folder upwards without __init__.py as the root."""
    assert not (ROOT / "__init__.py").exists()
    assert all((p.parent / "__init__.py").exists() for p in FILES)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_sizes(path):
    thin = path.parts[-2] in ("tasks", "workflows") and not path.name.startswith("_")
    limit = 140 if path.name == "artifacts.py" else 120 if thin else 350
    assert len(path.read_text().splitlines()) <= limit


def test_no_global_seed_no_pickle_no_global_precision():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"import pickle|torch\.load\((?!.*weights_only=True)", text), name(path)
        if name(path) != "dpldm_core/privacy/clipping.py":  # sets it for a product, and back
            assert not re.search(r"set_float32_matmul_precision|fp32_precision|allow_tf32", text), name(path)
        calls = [found[0] for found in re.finditer(r"\b(torch|np\.random|random)\.(manual_)?seed\(", text)]
        forked = re.findall(r"with torch\.random\.fork_rng\([^\n]*:\n +torch\.manual_seed\(", text)
        assert len(calls) == len(forked), f"{name(path)} seeds a global generator"


def test_no_registry_host_and_no_path_of_a_machine_in_requirements():
    paths = sorted((ROOT / "requirements").glob("*.txt"))
    assert paths
    for path in paths:
        assert not re.search(r"https?://|--index|--find-links|/home/|/root/", path.read_text()), path.name
