"""docs/pitfalls.md: every trap has its class, its guard and tests that exist."""

import re

import pytest

from tests.named import ROOT, exists

PAGE = (ROOT / "docs" / "pitfalls.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
TRAPS = [row for row in ROWS if row[0] != "trap"]
# Words of each trap that the page was asked to hold, in the order of the list.
ASKED_FOR = (
    "shape [B,1]",
    "tied decoder",
    "x.repeat(K)",
    "Batch statistics",
    "not finite",
    "private number of records",
    "Shuffled batches",
    "empty batch",
    "older accountant state",
    "memory manager",
    "constant seed",
    "Latent scale factor",
    "Best checkpoint",
    "Train loss",
    "without charge",
    "Digests of private data",
    "retry with fresh noise",
    "Averaging noise over workers",
)


def problems(row):
    """What is wrong with a row."""
    if len(row) != 4 or not all(row):
        return [f"{len(row)} cells: {row}"]
    _, kind, guard, tests = row
    found = [] if kind in ("critical", "theoretical", "negligible") else [f"class {kind!r}"]
    named = re.findall(r"`([^`]*)`", tests)
    found += [] if named and " ".join(f"`{name}`" for name in named) == tests else [f"tests {tests!r}"]
    found += [f"no test {name}" for name in named if not exists(f"tests/{name}")]
    files = re.findall(r"`([^`]*)`", guard)
    return found + [f"no file {f}" for f in files if not ((ROOT / "dpldm_core" / f).exists() or (ROOT / f).exists())]


@pytest.mark.parametrize("row", TRAPS, ids=lambda row: row[0][:40])
def test_a_row_is_whole_and_its_tests_exist(row):
    assert problems(row) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["t", "critical", "g"], "3 cells"),
        (["t", "critical", "", "`test_rng.py::test_uniform_bits`"], "4 cells"),
        (["t", "serious", "g", "`test_rng.py::test_uniform_bits`"], "class"),
        (["t", "critical", "g", "`test_rng.py::test_nothing`"], "no test"),
        (["t", "critical", "g", "test_rng.py::test_uniform_bits"], "tests"),
        (["t", "critical", "`privacy/nothing.py` refuses", "`test_rng.py::test_uniform_bits`"], "no file"),
    ],
)
def test_a_faulty_row_is_seen(row, words):
    assert any(words in problem for problem in problems(row))


def test_every_trap_that_was_asked_for_has_a_row():
    missing = [words for words in ASKED_FOR if not any(words.lower() in row[0].lower() for row in TRAPS)]
    assert missing == []
    assert len(TRAPS) == len({row[0] for row in TRAPS}) >= 60
