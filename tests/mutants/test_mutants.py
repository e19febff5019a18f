"""The table of mutants is whole and fits the code; `make mutants` applies it."""

import ast
from collections import Counter

import pytest

from tests.mutants.run import PAGE, ROOT, is_case_of, page
from tests.mutants.table import BEYOND, ITEMS, MUTANTS
from tests.named import exists


def test_everything_on_the_list_is_covered():
    assert len(ITEMS) == 25
    assert {m.stands_for for m in MUTANTS} == {*ITEMS, BEYOND}
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_fits_the_code(mutant):
    """Its old text occurs once, and what it makes of the file is Python: it cannot be killed by a syntax error."""
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: adapt the mutant in tests/mutants/table.py"
    changed = text.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_has_killers(mutant):
    assert mutant.killers
    assert [killer for killer in mutant.killers if not exists(killer)] == []


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == page(), "run: python -m tests.mutants.run --write"


def test_a_killer_is_a_test_or_one_of_its_cases():
    assert exists("tests/privacy/test_noise.py::test_no_noise_is_refused[0.0-1.0]")
    assert not exists("tests/privacy/test_noise.py::test_no_noise") and not exists("tests/nowhere.py::test_x")
    assert is_case_of("a.py::test_x[1]", "a.py::test_x") and not is_case_of("a.py::test_xy", "a.py::test_x")
