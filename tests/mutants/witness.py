"""pytest plugin of one run on a copy: what became of every test, and from where the tested modules came."""

import json
import sys
from pathlib import Path

import pytest

_ROOMS = ("dpldm_core", "tasks", "workflows", "tests")
_SEEN = []


def pytest_addoption(parser):
    parser.addoption("--witness", type=Path, help="file to write to")


def kinds(error):
    """Names of an exception's classes; of a group (hypothesis raises them), those that all of its members have."""
    if isinstance(error, BaseExceptionGroup):
        return set.intersection(*(kinds(member) for member in error.exceptions))
    return {kind.__name__ for kind in type(error).__mro__}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    errors = sorted(kinds(call.excinfo.value)) if call.excinfo else []
    _SEEN.append({"test": item.nodeid, "when": call.when, "outcome": report.outcome, "errors": errors})
    return report


def pytest_sessionfinish(session):
    modules = {n: m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] in _ROOMS and m.__file__}
    if path := session.config.getoption("--witness"):
        path.write_text(json.dumps({"tests": _SEEN, "modules": modules}))
