"""What each part of the method is worth: python benchmarks/ablation.py --data-root FOLDER [--json].

The same release again and again, each time without one part; the budget of a part that is left out goes to the others.
Accuracy, distance, epsilon and seconds of every arm, measured as in benchmarks/quality.py, one release each.
--arms runs some of them; the file keeps the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from quality import add_arguments, release_and_measure, request_of

from dpldm_core.data.sources import load_dataset
from dpldm_core.models.classifier import train_classifier
from dpldm_core.overrides import merge
from dpldm_core.release.measuring import FIRST_SEED

RESULTS = Path(__file__).parent / "results" / "ablation"
WHOLE = "the whole method"
KEPT = ("epsilon", "measured", "baselines", "release_minutes", "stages", "config", "machine")
SHARES = {"autoencoder": ("dp_sgd",), "prior": (), "diffusion": ("dp_sgd",), "teacher": ("dp_sgd",)}

# What each arm leaves out: the section whose private steps go, or single fields.
ARMS: dict[str, tuple[str | None, dict]] = {
    WHOLE: (None, {}),
    "no denoiser: plain samples of the prior": (
        "diffusion",
        {"diffusion": {"procedural_steps": 0}, "sampling": {"guidance": 0.0, "sharpness": 0.0}},
    ),
    "no procedural images for the denoiser": (None, {"diffusion": {"procedural_steps": 0}}),
    "no private steps of the denoiser": ("diffusion", {}),
    "no procedural images for the decoder": (None, {"autoencoder": {"procedural_steps": 0}}),
    "no private steps of the decoder": ("autoencoder", {}),
    "no noise for the decoder": (None, {"autoencoder": {"latent_noise": 0.0}}),
    "no guidance of the samples": (None, {"sampling": {"guidance": 0.0}}),
    "no sharpening of the samples": (None, {"sampling": {"sharpness": 0.0}}),
    "no teacher: classes as drawn": ("teacher", {"teacher": {"from_prior": False}}),
    "no private records for the teacher: samples of the prior teach it": ("teacher", {}),
}


def overrides(left_out: str | None, fields: dict, defaults: dict) -> dict:
    """Fields of the preset that an arm changes."""
    if left_out is None:
        return fields
    found: dict = {}
    for section, path in SHARES.items():
        block = defaults[section][path[0]] if path else defaults[section]
        own = defaults[left_out]["dp_sgd"]["budget_share"]
        changed = {"budget_share": 0.0 if section == left_out else block["budget_share"] / (1 - own)}
        found[section] = {path[0]: changed} if path else changed
    return merge(found, fields)


def main() -> None:
    """Run every arm and write the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(dataset="mnist", epsilon=1.0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--json", action="store_true", help="print the result last")
    arguments = parser.parse_args()
    if arguments.config:
        parser.error("--config is set by the arms")
    with tempfile.TemporaryDirectory() as folder:
        defaults = request_of(arguments, Path(folder)).config.model_dump()
    real = load_dataset(arguments.dataset, data_root=arguments.data_root, cache_dir=None, num_classes=None).train
    classes, epochs = real.schema.num_classes, defaults["evaluation"]["num_epochs"]
    judge = train_classifier(real.images, real.labels, num_classes=classes, num_epochs=epochs, seed=FIRST_SEED)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{arguments.dataset}-eps{arguments.epsilon:g}-{arguments.preset}.json"
    result: dict = {"dataset": arguments.dataset, "preset": arguments.preset, "arms": {}}
    for name in (arm for arm in ARMS if arm in arguments.arms):
        left_out, fields = ARMS[name]
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            changes = Path(folder) / "changes.json"
            changed = overrides(left_out, fields, defaults)
            changes.write_text(json.dumps(changed))
            own = vars(arguments) | {"config": str(changes)}
            own |= {"baselines": ["one_shot_prior"] if name == WHOLE else []}
            found = release_and_measure(argparse.Namespace(**own), Path(folder), judge)
        for section, values in merge(defaults, changed).items():
            if found["config"][section] != values:
                raise AssertionError(f"{name!r} changed more than that: {section} is {found['config'][section]}")
        if file.exists():  # another process may have run other arms meanwhile
            result = json.loads(file.read_text())
        measured = result["arms"] | {name: {key: found[key] for key in KEPT}}
        result["arms"] = {arm: measured[arm] for arm in ARMS if arm in measured}
        file.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
