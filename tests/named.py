"""Tests that are named elsewhere (docs/pitfalls.md, the table of mutants): do they exist?"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def tests_in(file):
    """Names of the test functions of a file, those of classes too; none when there is no such file."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def exists(node_id):
    """Whether path::name, with or without parameters in brackets, is a test of this repository."""
    file, _, name = node_id.partition("::")
    return name.partition("[")[0] in tests_in(file)
