"""Privacy mutation tests: python -m tests.mutants.run [--only NAME ...] [--jobs N] [--write].

Each mutant of table.py is one change that breaks the promise. It is applied to a copy of the tracked files, where its
killers run, and only they: they must fail there by an assertion, and pass on the copy without a mutant.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from json import loads
from pathlib import Path

from tests.mutants.table import BEYOND, ITEMS, MUTANTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutants.md"
ALL_PASSED, TESTS_FAILED = 0, 1  # pytest's exit codes
SECONDS = 300
HEAD = """# Privacy mutants and the tests that kill them

Generated from `tests/mutants/table.py`; do not edit, but run `python -m tests.mutants.run --write`. A mutant is one
change that breaks the promise. `make mutants` applies each to a copy of the code, where every test named beside it must
fail by an assertion (not by a fault of the mutant); without the mutant they must all pass.

{count} mutants. They cover the {items} kinds of fault that this suite set out to see; the rows under "{beyond}" came
on top.
"""
# Loaded once, in the process that every run is forked from; nothing of this repository, which each run has a copy of.
PRELOADED = ("torch", "opacus", "dp_accounting", "scipy.stats", "sqlalchemy", "pyarrow", "pydantic")
FORK = multiprocessing.get_context("forkserver")


def copy_tracked(target):
    """The tracked files as they are in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _pytest_in(copy, arguments, log):
    """Body of a forked process: pytest with a copy as its only source of this repository's modules."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [copy, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    import pytest

    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads and servers of a mutant


def run_tests(copy, tests, name="run"):
    """(exit code, what became of each test, output) of some tests in a copy."""
    witness, log = copy / f"{name}.witness.json", copy / f"{name}.log"
    options = ["-m", "", "-n", "0", "-q", "--no-header", "--tb=line", "--timeout", str(SECONDS), "--hypothesis-seed=0"]
    options += ["-p", "no:cacheprovider", "-p", "tests.mutants.witness", "--witness", str(witness)]
    process = FORK.Process(target=_pytest_in, args=(str(copy), [*options, *tests], str(log)))
    process.start()
    process.join(2 * SECONDS)
    process.kill()  # had it not ended
    process.join()
    said = log.read_text(errors="replace")[-3000:]
    if not witness.exists():
        return process.exitcode, [], said
    seen = loads(witness.read_text())
    origins = [Path(file).resolve() for file in seen["modules"].values()]
    assert origins and all(o.is_relative_to(copy) for o in origins), "the original was tested, not the copy"
    return process.exitcode, seen["tests"], said


def is_case_of(node_id, killer):
    """Whether a test that ran is the named one, or one of its parameters."""
    return node_id == killer or node_id.startswith(f"{killer}[")


def kill(mutant, pristine, folder):
    """(why the mutant survives, seconds); the first is empty when every killer fails as it should."""
    begin = time.monotonic()
    copy = Path(shutil.copytree(pristine, folder / mutant.name))
    why = _survival(mutant, copy)
    shutil.rmtree(copy)
    return why, time.monotonic() - begin


def _survival(mutant, copy):
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"its old text occurs {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()
    code, seen, said = run_tests(copy, mutant.killers)
    if code != TESTS_FAILED:
        return f"pytest exits with {code}: {said[-300:]}"
    proper = {"AssertionError", "Failed", *mutant.fails_by}  # Failed: pytest.raises that saw nothing raised
    for killer in mutant.killers:
        failed = [s for s in seen if is_case_of(s["test"], killer) and s["outcome"] == "failed"]
        if not failed:
            return f"{killer} passes"
        if not any(s["when"] == "call" and proper & set(s["errors"]) for s in failed):
            return f"{killer} fails by {failed[0]['errors']} in {failed[0]['when']}, not by an assertion"
    return ""


def control(mutants, pristine, pool, jobs):
    """Why the killers cannot be trusted; empty when all of them pass on the code without a mutant."""
    killers = sorted({killer for mutant in mutants for killer in mutant.killers})
    files = sorted({killer.split("::")[0] for killer in killers})
    shares = [[k for k in killers if k.split("::")[0] in files[i::jobs]] for i in range(jobs)]
    runs = [pool.submit(run_tests, pristine, share, f"control{i}") for i, share in enumerate(shares) if share]
    for code, seen, said in (run.result() for run in runs):
        if code != ALL_PASSED or any(s["outcome"] != "passed" for s in seen):
            return said
    return ""


def page():
    """docs/mutants.md."""
    lines = [HEAD.format(items=len(ITEMS), beyond=BEYOND, count=len(MUTANTS))]
    lines += ["| stands for | mutant | file | killed by |", "|---|---|---|---|"]
    for item in (*ITEMS, BEYOND):
        for m in (m for m in MUTANTS if m.stands_for == item):
            killers = "<br>".join(f"`{killer.removeprefix('tests/')}`" for killer in m.killers)
            lines.append(f"| {item} | {m.name.replace('_', ' ')} | `{m.file}` | {killers} |")
    return "\n".join(lines) + "\n"


def run(mutants, jobs):
    """The whole suite; the number of mutants that survive, or of those that cannot be judged."""
    begin, survivors = time.monotonic(), 0
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    FORK.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name).resolve()
        pristine = copy_tracked(folder / "pristine")
        if fault := control(mutants, pristine, pool, jobs):
            print(f"killers fail without any mutant:\n{fault}")
            return len(mutants)
        print(f"all killers pass on the code as it is ({time.monotonic() - begin:.0f} s)", flush=True)
        for mutant, (why, seconds) in zip(mutants, pool.map(lambda m: kill(m, pristine, folder), mutants), strict=True):
            survivors += bool(why)
            print(f"{'SURVIVES' if why else 'killed  '} {seconds:4.0f} s  {mutant.name}  {why}".rstrip(), flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed in {time.monotonic() - begin:.0f} s")
    return survivors


def main():
    """Command line: 0 when every mutant is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description="Privacy mutation tests.")
    parser.add_argument("--only", nargs="+", default=[], help="names of mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at work at a time")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md from the table, and run nothing")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(page())
        return 0
    if unknown := set(arguments.only) - {m.name for m in MUTANTS}:
        parser.error(f"unknown mutants: {', '.join(sorted(unknown))}")
    mutants = [m for m in MUTANTS if not arguments.only or m.name in arguments.only]
    return 1 if run(mutants, arguments.jobs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
