"""Write the tables of README.md and docs/results.md from the result files: python benchmarks/tables.py [--check]."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpldm_core.presets import REFERENCE_RECORDS, preset_values
from dpldm_core.privacy import accounting

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "README.md", HERE.parent / "docs" / "results.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The stages of a release in the order in which they run: the measurement is not among them.
MADE = (
    "open",
    "ingest",
    "train_autoencoder",
    "extract_latents",
    "train_diffusion",
    "train_teacher",
    "sample",
    "publish",
)
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}  # of the data sets that everybody publishes
PRESETS = {  # name: what it is for, data sets and epsilons beside it
    "quick": ("the default: a first look, and sets of some thousand images", [("mnist5k", 10)]),
    "cpu": ("60,000 images in less than half an hour on two idle cores", [("mnist", 1), ("fashion_mnist", 1)]),
    "long": (
        "more images, better named; from 300,000 records times epsilon on finer latents, and with two teachers",
        [("mnist", 1), ("fashion_mnist", 1), ("mnist", 10), ("fashion_mnist", 10)],
    ),
    "gpu": ("a wider denoiser, for one GPU; never run on one", []),
}
BASELINES = {
    "one_shot_prior": "one-shot prior",
    "dp_merf": "DP-MERF",
    "pixel_dpdm": "DPDM on pixels",
    "pixel_dpdm_without_noise": "the same without noise (a control, not private)",
}

USUAL = "delta 1e-05, ADD_OR_REMOVE_ONE"  # what an epsilon is stated with, where a row does not say otherwise
ONE_SUM = "\u2020"  # on a result that was made before decision 21
MOVED = "\u2021"  # on a result with values that its preset has not any more
_MOVED_NOTE = f"{MOVED}: with values that the preset had then; the first table of docs/results.md says which."
# What results did that were made before there was such a field.
BEFORE = {"fine_tuned": False, "num_copies": 0, "first_share": 0.0}


def results_of_quality() -> list[dict]:
    """All result files of benchmarks/quality.py, in the order of the tables."""
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results" / "quality").glob("*.json"))]
    return sorted(results, key=lambda r: (r["dataset"], r["preset"], r["config"]["latent_mechanism"], -r["epsilon"]))


def _preset_of(result: dict) -> str:
    """The preset of a result, with the values that it had then and has not now."""
    config = result["config"]
    now = preset_values(result["preset"], config["num_records"] or REFERENCE_RECORDS, config["epsilon"])
    names = ("autoencoder", "prior", "diffusion", "teacher", "sampling")
    sections = [(name, now[name] | BEFORE | config[name], now[name]) for name in names]
    sections += [(f"{name}.dp_sgd", had["dp_sgd"], has["dp_sgd"]) for name, had, has in sections if "dp_sgd" in has]
    then = [
        f"{name}.{field} {had[field]:{',' if isinstance(had[field], int) else '.3g'}}"
        for name, had, has in sections
        for field, value in has.items()
        if field not in ("num_samples", "dp_sgd") and had[field] != value
    ]
    name = result["preset"] + _mark(config)
    return f"{name} ({', '.join(then)})" if then else name


def _mark(config: dict | None) -> str:
    """What tells a result of before decision 21; those that carry no configuration are of before it."""
    return "" if config and "mean_share" in config["prior"] else ONE_SUM


def presets_table() -> str:
    """One row per preset, with results of some of its releases."""
    rows = ["| `--preset` | for | images | measured (small CNN on real test images) |", "|---|---|---|---|"]
    names = TITLES | {"mnist5k": "embedded digits"}
    newest = {(r["dataset"], r["preset"], r["config"]["epsilon"]): r for r in _oldest_first()}
    for preset, (purpose, shown) in PRESETS.items():
        images = f"{preset_values(preset, REFERENCE_RECORDS, 10.0)['sampling']['num_samples']:,}"
        found = []
        for dataset, epsilon in shown:
            result = newest[dataset, preset, epsilon]
            accuracy = 100 * result["measured"]["train_on_synthetic_accuracy"]["mean"]
            minutes = f"{result['release_minutes']:.1f} minutes of {_cores_of(result)}"
            drawn = f"{result['config']['num_samples']:,}"
            more = "" if drawn == images else f" with {drawn} images"
            found.append(f"{names[dataset]}, epsilon {epsilon}: {accuracy:.1f}{_moved(result)} %{more} in {minutes}")
        rows.append(f"| `{preset}` | {purpose} | {images} | {'; '.join(found) or 'no result'} |")
    return "\n".join([*rows, "", _MOVED_NOTE] if any(MOVED in row for row in rows) else rows)


def _moved(result: dict) -> str:
    """What tells a result with values that its preset has not any more."""
    return "" if _preset_of(result) == result["preset"] + _mark(result["config"]) else MOVED


def _oldest_first() -> list[dict]:
    """Results in the tables' order, those of before decision 21 and of presets of before ahead of the others."""
    return sorted(results_of_quality(), key=lambda r: (_mark(r["config"]) == "", _moved(r) == ""))


def stages_table() -> str:
    """Wall and processor seconds and peak memory in GB of each stage of the same releases."""
    stages = [*MADE, "evaluate"]
    rows = [
        "| data | epsilon | preset | " + " | ".join(stages) + " | images |",
        "|" + "---|" * (4 + len(stages)),
    ]
    for result in results_of_quality():
        found = [result["stages"][name] for name in stages]
        peaks = [stage["peak_memory_gb"] for stage in found]
        so_far = "<" if peaks == sorted(peaks) else ""  # then it is that of the process until the stage's end
        cells = (
            result["dataset"],
            f"{result['config']['epsilon']:g}",
            _preset_of(result),
            *(f"{s['wall_seconds']:.0f}, {s['cpu_seconds']:.0f}, {so_far}{s['peak_memory_gb']:.1f}" for s in found),
            f"{result['config']['num_samples']:,}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def quality_table() -> str:
    """One row per result file of benchmarks/quality.py."""
    rows = [
        f"| data | epsilon ({USUAL}) | preset | small CNN trained on it: accuracy, sd, max of n, images | on "
        "real data | Frechet distance / floor | same epsilon, same run: accuracy of n classifiers, distance, "
        "processor seconds | "
        "minutes | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(rows + [_quality_row(result) for result in results_of_quality()])


def _quality_row(result: dict) -> str:
    measured = result["measured"]
    accuracy, ceiling = measured["train_on_synthetic_accuracy"], measured["ceiling_accuracy"]
    metric = next(name for name in ("fid", "fd_inception768", "fd_real_classifier") if name in measured)
    frechet = measured[metric]
    deviation = f"{100 * accuracy['std']:.1f}" if accuracy["std"] is not None else "-"
    others = [
        f"{BASELINES[name]} {100 * found['train_on_synthetic_accuracy']['mean']:.1f} of "
        f"{found['train_on_synthetic_accuracy']['num_seeds']}, {found[metric]['distance']:.3g}, "
        f"{result['stages'][name]['cpu_seconds']:.0f}"
        for name, found in result.get("baselines", {}).items()
    ]
    promise = f"delta {result['delta']:g}, {result['neighboring_relation']}"
    mode = "" if result["config"]["latent_mechanism"] == "dp_sgd" else ", noised_latents"
    cells = (
        f"{result['dataset']}{mode}",
        f"{result['epsilon']:.2f}" + (f" ({promise})" if promise != USUAL else ""),
        _preset_of(result),
        f"{100 * accuracy['mean']:.1f}, {deviation}, {100 * accuracy['max']:.1f} of {accuracy['num_seeds']}, "
        f"{accuracy['num_images']:,}",
        f"{100 * ceiling['mean']:.1f}",
        f"{frechet['distance']:.3g} / {frechet['floor']:.3g} ({metric}, n={frechet['num_images']:,})",
        "; ".join(others) or "-",
        f"{result['release_minutes']:.1f}",
        _machine_of(result),
    )
    return "| " + " | ".join(cells) + " |"


def _machine_of(result: dict) -> str:
    """Where the release was made."""
    here = result["machine"]
    return here["gpu"] or f"{_cores_of(result)}, {here['processor']}, {here['instructions'][-1]}"


def _cores_of(result: dict) -> str:
    """On how many."""
    cores = result["machine"]["cores"]
    return f"{cores} core" + "s" * (cores != 1)


def fewer_table() -> str:
    """One row per result file of benchmarks/fewer.py, beside the whole release."""
    rows = [
        "| data | epsilon | preset | images | small CNN trained on the first of them: accuracy, sd, max of n, images | "
        "Frechet distance / floor |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results" / "fewer").glob("*.json")):
        result = json.loads(path.read_text())
        config, accuracy = result["config"], result["measured"]["train_on_synthetic_accuracy"]
        frechet = result["measured"]["fd_real_classifier"]
        cells = (
            result["dataset"],
            f"{config['epsilon']:g}",
            _preset_of(result),
            f"{config['num_samples']:,}",
            f"{100 * accuracy['mean']:.1f}, {100 * accuracy['std']:.1f}, {100 * accuracy['max']:.1f} of "
            f"{accuracy['num_seeds']}, {accuracy['num_images']:,}",
            f"{frechet['distance']:.3g} / {frechet['floor']:.3g}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def readers_table() -> str:
    """One row per result file of benchmarks/readers.py."""
    kinds = ("named", "named_alike", "unknown", "taken_for_real")
    rows = [
        "| data | epsilon | preset | images of each kind, sheets | named as they are labelled: synthetic, real | with "
        "look-alikes as one class | not to be named | taken for real |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results" / "readers").glob("*.json")):
        result = json.loads(path.read_text())
        synthetic, real = result["synthetic"], result["real"]
        cells = (
            result["dataset"],
            f"{_epsilon_of(result):g}",
            _preset_of(result),
            f"{synthetic['images']}, {result['sheets']}",
            *(f"{100 * synthetic[k] / synthetic['images']:.0f}, {100 * real[k] / real['images']:.0f} %" for k in kinds),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def guidance_table() -> str:
    """Releases that were sampled with several strengths of guidance."""
    rows = [
        "| data | epsilon | preset | guidance | accuracy, classifiers | distance | of the one-shot prior's |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results_of_quality():
        own = f"{result['config']['sampling'].get('guidance', 0):g}"
        again = result.get("guidance", {})
        for strength, found in ({own: result["measured"]} | again).items() if again else ():
            accuracy, distance = found["train_on_synthetic_accuracy"], found["fd_real_classifier"]["distance"]
            prior = (
                result["baselines"].get("one_shot_prior", {}).get("fd_real_classifier", {}).get("distance", math.nan)
            )
            cells = (
                result["dataset"],
                f"{result['config']['epsilon']:g}",
                _preset_of(result),
                strength,
                f"{100 * accuracy['mean']:.1f}, {accuracy['num_seeds']}",
                f"{distance:.3g}",
                f"{distance / prior:.2f}",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def fidelity_table() -> str:
    """One row per result file of benchmarks/fidelity.py, and per one of quality.py that tells precision and recall."""
    rows = [
        "| data | epsilon | preset | metric, images a side | floor | release | one-shot prior | release / prior | "
        "precision, recall: release | one-shot prior | real test images |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = [json.loads(path.read_text()) for path in (HERE / "results" / "fidelity").glob("*.json")]
    found += [_fidelity_of(result) for result in results_of_quality() if result["measured"].get("precision_recall")]
    for result in sorted(found, key=lambda r: (r["dataset"], r["metric"], r["preset"], _epsilon_of(r))):
        release, prior = result["release"], result.get("one_shot_prior")
        cells = (
            result["dataset"],
            f"{_epsilon_of(result):g}",
            result["preset"] + (_moved(result) if "config" in result else "") + _mark(result.get("config")),
            f"{result['metric']}, {result['num_images']:,}",
            f"{result['floor']:.3g}",
            f"{release['distance']:.3g}",
            f"{prior['distance']:.3g}" if prior else "-",
            f"{release['distance'] / prior['distance']:.2f}" if prior else "-",
            *(_shares_of(result.get(name)) for name in ("release", "one_shot_prior", "real_test")),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _fidelity_of(result: dict) -> dict:
    """What benchmarks/quality.py measured, as benchmarks/fidelity.py writes it."""
    shares = result["measured"]["precision_recall"]
    metric, num_images = shares["metric"], shares["num_images"]
    sets = {"release": result["measured"]} | result["baselines"]
    return {
        **{key: result[key] for key in ("dataset", "preset", "config")},
        **{"metric": metric, "num_images": num_images, "floor": result["measured"][metric]["floor"]},
        "real_test": {"precision": shares["heldout_precision"], "recall": shares["heldout_recall"]},
        **{name: found["precision_recall"] | {"distance": found[metric]["distance"]} for name, found in sets.items()},
    }


def _epsilon_of(result: dict) -> float:
    return result["config"]["epsilon"] if "config" in result else result["epsilon"]


def _shares_of(found: dict | None) -> str:
    """Precision and recall, where they were measured."""
    return f"{found['precision']:.2f}, {found['recall']:.2f}" if found and "precision" in found else "-"


def ablation_table() -> str:
    """One row per arm of benchmarks/ablation.py."""
    measures = ("accuracy", "Frechet distance", "precision, recall", "epsilon", "seconds of processor")
    columns = ("data", "preset", "left out", *measures)
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for path in sorted((HERE / "results" / "ablation").glob("*.json")):
        result = json.loads(path.read_text())
        for name, arm in result["arms"].items():
            seconds = sum(stage["cpu_seconds"] for stage_name, stage in arm["stages"].items() if stage_name in MADE)
            label = f"{result['dataset']} | {result['preset']}{_mark(arm['config'])}"
            rows.append(_ablation_row(label, name, arm["measured"], arm["epsilon"], f"{seconds:.0f}"))
            for other, found in arm["baselines"].items():
                left = f"all but the {BASELINES[other]}, which takes all of epsilon"
                rows.append(_ablation_row(label, left, found, arm["epsilon"], "-"))
    return "\n".join(rows)


def _ablation_row(label: str, left_out: str, measured: dict, epsilon: float, seconds: str) -> str:
    accuracy, distance = measured["train_on_synthetic_accuracy"]["mean"], measured["fd_real_classifier"]["distance"]
    shares = _shares_of(measured.get("precision_recall"))
    return f"| {label} | {left_out} | {100 * accuracy:.1f} | {distance:.3g} | {shares} | {epsilon:.2f} | {seconds} |"


def variety_table() -> str:
    """One row per point of benchmarks/variety.py."""
    result = json.loads((HERE / "results" / "variety.json").read_text())
    rows = [
        "| data | records | epsilon | accuracy, on real data | Frechet distance / floor | one-shot prior: accuracy, "
        "distance | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    order = lambda p: (p["kind"] != "plain", p["kind"], p["num_records"], p["epsilon"])  # noqa: E731
    for point in sorted(result["points"].values(), key=order):
        measured, prior = point["measured"], point["baselines"]["one_shot_prior"]
        accuracies = [
            f"{100 * found['mean']:.1f}" if found else "-"
            for found in (
                measured["train_on_synthetic_accuracy"],
                measured["ceiling_accuracy"],
                prior["train_on_synthetic_accuracy"],
            )
        ]
        frechet = measured["fd_real_classifier"]
        cells = (
            point["kind"] + _mark(point.get("config")),
            f"{measured['num_images']['training']:,}",
            f"{point['epsilon']:.2f}",
            f"{accuracies[0]}, {accuracies[1]}",
            f"{frechet['distance']:.3g} / {frechet['floor']:.3g}",
            f"{accuracies[2]}, {prior['fd_real_classifier']['distance']:.3g}",
            f"{point['release_minutes']:.1f}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def published_table() -> str:
    """Accuracy and cost beside published methods, first by their small-CNN protocol, then as DPImageBench measures."""
    published = json.loads((HERE / "published.json").read_text())
    small, other = published["small_cnn"], published["dpimagebench"]
    columns = [(dataset, epsilon) for dataset in TITLES for epsilon in ("0.2", "1", "10")]
    head = " | ".join(f"{TITLES[dataset]}, {epsilon}" for dataset, epsilon in columns)
    rule = "|" + "---|" * (len(columns) + 2)

    def cells(accuracy: Mapping[str, Mapping[str, float | str]]) -> str:
        return " | ".join(str(accuracy.get(d, {}).get(e, "-")) for d, e in columns)

    rows = [f"| method | {head} | cost of one release |", rule]
    rows += [f"| {found['method']} | {cells(found['accuracy'])} | {found['cost']} |" for found in small["methods"]]
    for preset in ("cpu", "long"):
        own = [r for r in _oldest_first() if r["dataset"] in TITLES and r["preset"] == preset]
        accuracy: dict[str, dict[str, str]] = {}
        for r in own:
            mean = 100 * r["measured"]["train_on_synthetic_accuracy"]["mean"]
            told = f"{mean:.1f}{_mark(r['config'])}{_moved(r)}"
            accuracy.setdefault(r["dataset"], {})[f"{r['config']['epsilon']:g}"] = told
        hours = [sum(r["stages"][name]["cpu_seconds"] for name in MADE) / 3600 for r in own]
        cost = f"{min(hours):.1f} to {max(hours):.1f} hours of one CPU core"
        rows.append(f"| **dpldm, preset {preset}** | {cells(accuracy)} | {cost} |")
    note = f" {_MOVED_NOTE}" if any(MOVED in row for row in rows) else ""
    rows += ["", f"{small['source']}.{note}", "", f"| method | {head} | images used that are public |", rule]
    rows += [f"| {found['method']} | {cells(found['accuracy'])} | {found['public']} |" for found in other["methods"]]
    rows += ["", f"{other['source']}: another protocol, not to be compared row by row with the first."]
    return "\n".join([*rows, f"At its delta {_at(other['delta'])}."])


def _at(delta: float) -> str:
    """What releases of MNIST with preset cpu cost at another delta."""
    own = [r for r in _oldest_first() if r["dataset"] == "mnist" and r["preset"] == "cpu"]
    asked = {r["config"]["epsilon"]: r for r in own}  # what was made since takes the place of what was made before
    found = []
    for _, r in sorted(asked.items()):
        events = [accounting.event_from_json(item["event"]) for item in r["events"]]
        relation = accounting.relation_from_name(r["neighboring_relation"])
        found.append(f"{accounting.epsilon(events, delta, relation):.2f} ({r['epsilon']:.2f} at {r['delta']:g})")
    return f"MNIST's releases with preset cpu have epsilon {', '.join(found)}"


def audit_table() -> str:
    """One row per result file of benchmarks/audit.py: bounds of the true code, and which faults exceed the claim."""
    rows = [
        "| release | claim of the audited stages | its lower bounds: f-DP, GDP | faults seen by f-DP | by GDP alone | "
        "missed |",
        "|---|---|---|---|---|---|",
    ]
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results" / "audit").glob("*.json"))]
    for result in sorted(results, key=lambda r: r["epsilon"]):
        whole, faults = result["runs"][-1], result["mutants"]
        seen = [name for name, fault in faults.items() if "f_dp" in fault["seen_by"]]
        by_gdp = [name for name, fault in faults.items() if fault["seen_by"] and name not in seen]
        missed = [name for name, fault in faults.items() if not fault["seen_by"]]
        cells = (
            f"{result['dataset']}, epsilon {result['epsilon']:g}, {result['preset']}",
            f"{result['claim']:.2f}",
            f"{whole['f_dp']:.2f}, {whole['gdp_lower']:.2f}",
            *(", ".join(names) or "none" for names in (seen, by_gdp, missed)),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def dp_step_table() -> str:
    """One row per model, batch and noise multiplicity of benchmarks/dp_step.py."""
    path = HERE / "results" / "dp_step.json"
    result = json.loads(path.read_text())
    arms = {"ours": "ours", "ours_bfloat16": "ours, bfloat16 products", "opacus_ghost": "Opacus ghost"}
    arms |= {"opacus_hooks": "Opacus hooks", "vmap": "vmap(grad)"}
    rows = ["| model | batch | draws | " + " | ".join(arms.values()) + " |", "|" + "---|" * (3 + len(arms))]
    for row in result["rows"]:
        found = [f"{row['arms'][arm]['ratio']:.2f}" if arm in row["arms"] else "" for arm in arms]
        cells = (row["model"], f"{row['batch']:,}", str(row["noise_multiplicity"]), *found)
        rows.append("| " + " | ".join(cells) + " |")
    memory = "; ".join(
        f"{name}: {found['ours'] - found['no_privacy']:+.2f} GB" for name, found in result["peak_memory_gb"].items()
    )
    machine = result["machine"]
    return "\n".join(
        [
            *rows,
            "",
            f"Peak memory beyond the plain step: {memory}. Medians of {result['rounds']} rounds, {result['threads']} "
            f"thread(s), {machine['processor']} ({', '.join(machine['instructions'])}).",
        ]
    )


def overhead_table() -> str:
    """What benchmarks/overhead.py found: a release without its stages and its evaluation."""
    rows = [
        "| data | images | seconds of start-up, imports, input and output, bookkeeping: median of n | where ledger and "
        "MLflow store are new | machine |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results" / "overhead").glob("*.json")):
        result = json.loads(path.read_text())
        later = max(1, len(result["rounds"]) - 1)
        cells = (
            result["dataset"],
            f"{result['num_samples']:,}",
            f"{result['median_of_later']:.1f} of {later}",
            f"{result['first']:.1f}",
            _machine_of(result),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


TABLES = {
    "presets": presets_table,
    "published": published_table,
    "quality": quality_table,
    "fewer": fewer_table,
    "stages": stages_table,
    "overhead": overhead_table,
    "fidelity": fidelity_table,
    "readers": readers_table,
    "guidance": guidance_table,
    "ablation": ablation_table,
    "variety": variety_table,
    "audit": audit_table,
    "dp_step": dp_step_table,
}


def rendered(text: str) -> str:
    """The text with every marked table written anew."""
    return MARK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> int:
    """Write the tables, or with --check tell whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with the number of pages out of date")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.read_text() != rendered(page.read_text())]
    if check:
        return len(stale)
    for page in stale:
        page.write_text(rendered(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
