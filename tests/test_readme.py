"""What README.md tells a stranger to type exists, and its numbers come from committed result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets


def test_every_option_of_the_release_exists():
    from workflows.release import release_pipeline, resample_pipeline
    from workflows.sweep import sweep_pipeline

    pipelines = release_pipeline, resample_pipeline, sweep_pipeline
    known = {"help", "raise", *(name for pipeline in pipelines for name in pipeline.python_interface.inputs)}
    known |= {"account", "budget-epsilon", "inception-weights", "dry-run"}
    assert set(re.findall(r"--([a-z][a-z_-]+)", README)) <= known


@pytest.mark.parametrize("folder, page", [(ROOT, README), (ROOT / "docs", RESULTS)], ids=["README", "results"])
def test_every_link_leads_somewhere(folder, page):
    found = re.findall(r"\]\((?!http)([^)#]+)\)", page)
    assert len(found) > 5
    for path in found:
        assert (folder / path).exists(), path


def test_every_benchmark_command_has_a_script_with_these_options():
    commands = re.findall(r"python (benchmarks/\w+\.py)((?: [^\n`]+)?)", RESULTS)
    assert len({script for script, _ in commands}) >= 8
    for script, arguments in commands:
        source = (ROOT / script).read_text()
        if "add_arguments(parser)" in source:
            source += (ROOT / "benchmarks" / "quality.py").read_text()
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in source, (script, option)


def test_every_environment_variable_is_read_somewhere():
    sources = "\n".join(p.read_text() for p in (*(ROOT / "tasks").glob("*.py"), ROOT / "dpldm_core/privacy/ledger.py"))
    for name in re.findall(r"`((?:DPLDM|MLFLOW)_[A-Z_]+)`", README):
        assert name in sources, name


def test_tables_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"])
    assert done.returncode == 0, "run: python benchmarks/tables.py"
