"""Utility and fidelity of one release against real data: one result file per run.

python benchmarks/quality.py --dataset mnist --epsilon 1 --preset cpu --data-root FOLDER

Runs the very stages of a release (real mechanisms, fresh noise, the bundle is written and verified), then trains the
small CNN of protocol B for each seed (tested on the real test set, fixed epochs, nothing selected) and measures Frechet
distances beside the floor of real training against real test images. The numbers are computed from real data, so they
are internal; public data sets protect nobody, so theirs may be shown.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _baselines import BASELINES
from _machine import describe_machine
from tables import MADE

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.data.schema import read_records
from dpldm_core.models.classifier import SmallCnn, train_classifier
from dpldm_core.privacy.calibration import TEACHER
from dpldm_core.release.bundle import digest
from dpldm_core.release.measuring import FIRST_SEED, evaluate_files
from dpldm_core.release.opening import Decision, Request, check_request, decide
from dpldm_core.release.publishing import Publication, publish_release
from dpldm_core.release.sampling import write_shard
from dpldm_core.release.synthetic import write_synthetic_parquet
from dpldm_core.release.verify import verify_bundle
from dpldm_core.rng import SecretKey
from dpldm_core.training import stages

RESULTS = Path(__file__).parent / "results" / "quality"
KEPT = ("decoder", "denoiser")


def _forget_peak() -> bool:
    """Start the process's peak of resident memory again; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(since_forgotten: bool) -> int:
    """Peak of resident memory, since :func:`_forget_peak` where that worked, else since the process began."""
    if not since_forgotten:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


class Clock:
    """Wall and processor seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body."""
        own_peak, wall, cpu = _forget_peak(), time.perf_counter(), time.process_time()
        yield
        self.stages[name] = {
            "wall_seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_memory_gb": round(_peak_bytes(own_peak) / 1e9, 2),
        }
        print(f"{name:18s} {self.stages[name]}", flush=True)


def minutes_of(measured: dict[str, dict[str, float]]) -> float:
    """Minutes of a release from the seconds of its stages; the measurement is not among them."""
    return round(sum(measured[name]["wall_seconds"] for name in MADE if name in measured) / 60, 2)


def request_of(arguments: argparse.Namespace, folder: Path) -> Request:
    """The release that the arguments of :func:`add_arguments` ask for, with its bundle below ``folder``."""
    return check_request(
        dataset=arguments.dataset,
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        preset=arguments.preset,
        num_samples=arguments.num_samples,
        latent_mechanism=arguments.latent_mechanism,
        budget_epsilon=0.0,
        out=str(folder / "releases"),
        config=arguments.config,
    )


def train_models(train: Path, decision: Decision, folder: Path, clock: Clock) -> tuple[dict[str, Path], float]:
    """The stages that spend, on private records.

    Args:
        train: Private training records.
        decision: Configuration, plan and schema.
        folder: Where the models are written.
        clock: Measures each stage.

    Returns:
        The public model files by name, and the noise of the latents that the denoiser was trained on.
    """
    config, plan = decision.request.config, decision.plan
    keys = {m.stage: SecretKey.generate() for m in plan.mechanisms}
    run = stages.Run(folder)
    with clock.stage("train_autoencoder"):
        autoencoder, decoder, _ = stages.train_codec(train, config, plan, keys.__getitem__, run)
    with clock.stage("extract_latents"):
        latents, noise_std = stages.extract_latents(train, autoencoder, config, plan, keys.__getitem__, run)
    with clock.stage("train_diffusion"):
        files = latents, noise_std, config, decision.schema
        denoiser, _ = stages.train_diffusion(*files, plan, keys.__getitem__, run)
    models = {"decoder": decoder, "denoiser": denoiser}
    with clock.stage("train_teacher"):
        if TEACHER in plan.stages():
            files = train, autoencoder, decoder, denoiser
            models["teacher"] = stages.train_teacher(*files, config, plan, keys.__getitem__, run)
        elif config.named_by_prior(decision.schema.num_classes):
            models["teacher"] = stages.teach_from_prior(decoder, denoiser, config, decision.schema, run)
    return models, noise_std


def release_and_measure(arguments: argparse.Namespace, folder: Path, real_classifier: SmallCnn | None = None) -> dict:
    """All stages of one release, then its measurement, with features of a classifier of the real training records.

    Args:
        arguments: From :func:`add_arguments`.
        folder: Where files are written.
        real_classifier: Whose features the distances are of; None: one is trained.

    Returns:
        The result file.
    """
    machine, clock = describe_machine(), Clock()
    with clock.stage("open"):
        decision = decide(request_of(arguments, folder), data_root=arguments.data_root, cache_dir=str(folder))
    config, schema = decision.request.config, decision.schema
    with clock.stage("ingest"):
        train, heldout = ingest_dataset(
            config.dataset,
            folder,
            split_key=b"benchmark",
            data_root=arguments.data_root,
            cache_dir=str(folder),
            num_classes=config.num_classes,
            relation=decision.plan.relation,
            schema=schema,
        )
    models, noise_std = train_models(train, decision, folder, clock)

    def drawn(settings: ReleaseConfig, where: Path) -> Path:
        where.mkdir(exist_ok=True)
        return write_shard(where, 0, settings, schema.model_dump_json(), noise_std=noise_std, num_shards=1, **models)

    with clock.stage("sample"):
        part = drawn(config, folder)
    with clock.stage("publish"):
        published = _publish(decision, part, models, noise_std, folder)
    report = verify_bundle(published.bundle, strict=True).report
    if arguments.picture:
        Path(arguments.picture).write_bytes(published.samples_png)
    real = read_records(train)

    def measured(part: Path, num_seeds: int) -> dict:
        asked = {"num_seeds": num_seeds, "max_frechet_images": arguments.frechet_images}
        options = {"inception_weights": arguments.inception_weights or None, "real_classifier": real_classifier}
        evaluate_files([part], train, heldout, folder, config.evaluation.model_copy(update=asked), **options)
        return json.loads((folder / "evaluation.json").read_text())

    with clock.stage("evaluate"):
        if schema.num_classes > 1 and real_classifier is None:
            epochs = config.evaluation.num_epochs
            settings = {"num_classes": schema.num_classes, "num_epochs": epochs, "seed": FIRST_SEED}
            real_classifier = train_classifier(real.images, real.labels, **settings)
        result = measured(part, arguments.seeds)
    baselines, images = {}, {"release": part}
    for name in arguments.baselines if config.latent_mechanism == "dp_sgd" else ():
        with clock.stage(name):
            images[name] = path = folder / f"{name}.parquet"
            write_synthetic_parquet(path, *BASELINES[name](real, config), schema.class_names, schema.labelled)
        baselines[name] = measured(path, 1)
        print(name, baselines[name]["train_on_synthetic_accuracy"], flush=True)
    guided = {}
    for strength in arguments.guidance:
        sampling = config.sampling.model_copy(update={"guidance": strength})
        with clock.stage(f"guidance {strength:g}"):
            again = drawn(config.model_copy(update={"sampling": sampling}), folder / f"guidance-{strength:g}")
        guided[f"{strength:g}"] = measured(again, 1)
        print(strength, guided[f"{strength:g}"]["train_on_synthetic_accuracy"], flush=True)
    print(f"accuracy {result['train_on_synthetic_accuracy']}", flush=True)
    return {
        "dataset": Path(arguments.dataset).stem,
        "preset": arguments.preset,
        "protocol": "B: small CNN, real test set, fixed epochs, mean, deviation and max over seeds",
        "tuned_on": arguments.tuned_on,
        "epsilon": report.epsilon,
        "delta": report.delta,
        "neighboring_relation": report.neighboring_relation,
        "epsilon_replace_one": report.epsilon_replace_one,
        "events": [event.model_dump(mode="json") for event in report.events],
        "release_minutes": minutes_of(clock.stages),
        "stages": clock.stages,
        "measured": result,
        "baselines": baselines,
        "guidance": guided,
        "config": config.model_dump(mode="json"),
        "images_sha256": {name: digest(path)["sha256"] for name, path in images.items()},
        "machine": machine,
    }


def _publish(decision: Decision, part: Path, models: dict[str, Path], noise_std: float, folder: Path) -> Publication:
    request = decision.request
    return publish_release(
        request.out,
        request.release_id,
        request.config,
        decision.plan.model_dump_json(),
        decision.schema.model_dump_json(),
        account=request.account,
        entry="benchmark",
        synthetic=[str(part)],
        model_files={name: str(path) for name, path in models.items()},
        noise_std=noise_std,
        work=folder,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a release is made from and how it is measured."""
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--num-samples", type=int, default=0)
    parser.add_argument("--latent-mechanism", default="dp_sgd")
    parser.add_argument("--config", default="", help="file that overrides single fields of the preset")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers trained")
    parser.add_argument("--frechet-images", type=int, default=10_000, help="images a side")
    parser.add_argument("--inception-weights", default="", help="file with Inception weights")
    parser.add_argument("--tuned-on", default="", help="data that the preset's values were chosen on")
    parser.add_argument(
        "--baselines", nargs="*", default=["one_shot_prior"], choices=sorted(BASELINES), help="measured in the same run"
    )
    parser.add_argument(
        "--guidance", nargs="*", type=float, default=[], help="strengths that the same release is sampled with again"
    )
    parser.add_argument("--picture", default="", help="where to write samples.png")


def main() -> None:
    """Run one release and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--name", default="", help="name of the result file")
    parser.add_argument("--keep", default="", help="folder for models and images of the release and of other methods")
    arguments = parser.parse_args()
    default = f"{Path(arguments.dataset).stem}-eps{arguments.epsilon:g}-{arguments.preset}-{arguments.latent_mechanism}"
    name = arguments.name or default
    path = RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        result = release_and_measure(arguments, Path(folder))
        drawn = {"shard-00000": "release"} | {baseline: baseline for baseline in result["baselines"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)
        if arguments.keep:
            kept = Path(arguments.keep) / name
            kept.mkdir(parents=True, exist_ok=True)
            for file, as_name in drawn.items():
                shutil.copy(Path(folder) / f"{file}.parquet", kept / f"{as_name}.parquet")
            for model in KEPT:
                shutil.copy(Path(folder) / f"{model}.safetensors", kept)


if __name__ == "__main__":
    main()
