"""The whole release workflow in one process, on small data."""

import json
import os
import re

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpldm_core.errors import BudgetError, BundleError, ConfigError, DataError, LedgerError, TrackingError
from dpldm_core.privacy.ledger import Ledger
from dpldm_core.release.synthetic import read_synthetic
from dpldm_core.release.verify import verify_bundle
from dpldm_core.rng import SecretKey
from tasks.closing import close_failed_release, close_failed_sweep
from tasks.opening import open_release
from tests.tasks.conftest import NUM_RECORDS, drawings
from workflows.release import release_pipeline, resample_pipeline

PRIOR = ["latent_means", "latent_covariances"]
STAGES = ["train_autoencoder", *PRIOR, "train_diffusion", "train_teacher"]


def release(dataset, **inputs):
    return release_pipeline(**{"dataset": dataset, "preset": "smoke", "num_samples": 40, "epsilon": 5.0} | inputs)


def runs():
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("dpldm")
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def public_text(bundle):
    return "\n".join((bundle / name).read_text() for name in ("config.json", "privacy_report.json", "README.md"))


def test_own_data_from_files_to_a_verified_bundle(machine, own_data, ledger):
    result = release(own_data)
    bundle = machine / "releases" / result.release_id
    found = verify_bundle(bundle, strict=True)
    assert (found.num_samples, result.delta) == (40, 1e-5)
    assert 4.95 <= result.epsilon == found.report.epsilon <= 5.0
    assert found.report.neighboring_relation == "ADD_OR_REMOVE_ONE"
    assert [e.stage for e in found.report.events] == STAGES
    images, labels = read_synthetic(bundle)
    assert images.shape == (40, 8, 8, 1) and set(labels.tolist()) <= {0, 1, 2}
    assert [p.name for p in (machine / "releases").iterdir()] == [result.release_id]
    assert {p.stem for p in (bundle / "model").iterdir()} == {"decoder", "denoiser", "teacher"}

    books = ledger.books()
    [entry] = books.entries.values()
    assert entry.state == "published" and sorted(entry.stages) == sorted(STAGES)
    assert books.spent(own_data) == pytest.approx(result.epsilon, abs=1e-9)
    assert books.account(own_data).budget_epsilon == 5.0, "own data: one release, until its steward raises the cap"
    assert found.report.ledger.entry == entry.entry_id

    text = public_text(bundle)
    assert not _shows(NUM_RECORDS, text) and str(machine) not in text, "no count and no path of the steward's"
    _check_lineage(result, own_data)
    _check_second_release_is_refused(machine, own_data, ledger)


def _shows(number, text):
    """Whether a text holds a number by itself: not as digits of a time, an identifier or a fraction."""
    pattern = rf"(?<![\w.]){number}(\.0+)?(?![\w.])"
    assert re.search(pattern, f'"a": {number},') and re.search(pattern, f'"{number}.0"'), "it can find one"
    return re.search(pattern, text) is not None


def _check_lineage(result, own_data):
    """Parent, children, spend per stage, data and model lineage; private data as a URI alone."""
    client = mlflow.MlflowClient()
    [parent] = [r for r in runs() if r.data.tags.get("dpldm.kind") == "release"]
    assert parent.info.status == "FINISHED" and parent.info.run_name == result.release_id
    assert parent.data.metrics["epsilon"] == pytest.approx(result.epsilon)
    announced = {seal for r in runs() if (seal := r.data.params.get("manifest_sha256"))}
    assert announced == {verify_bundle(result.bundle).manifest_sha256}, "what a stranger compares with verify"
    children = {r.info.run_name: r for r in runs() if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    expected = {"ingest", "train_autoencoder", "extract_latents", "train_diffusion", "train_teacher"}
    assert set(children) == expected | {"sample-0", "sample-1", "evaluate", "publish"}
    spent = {k for c in children.values() for k in c.data.metrics if k.startswith("epsilon.")}
    assert spent == {f"epsilon.{stage}" for stage in STAGES} <= set(parent.data.metrics)
    lineage = {d.dataset.name: json.loads(d.dataset.source)["url"] for d in parent.inputs.dataset_inputs}
    assert lineage == {"private_data": own_data, result.release_id: result.bundle}
    [private] = children["ingest"].inputs.dataset_inputs
    assert json.loads(private.dataset.source)["url"] == own_data
    assert private.dataset.digest == "private" and not json.loads(private.dataset.profile or "{}")
    logged = json.dumps([r.to_dictionary() for r in runs() if r.info.run_name != "evaluate"])
    assert not _shows(NUM_RECORDS, logged), "no private count in any run but the internal evaluation"
    version = client.get_model_version_by_alias("dpldm-scans-npz", "current")
    files = mlflow.artifacts.download_artifacts("models:/dpldm-scans-npz@current")
    assert str(version.version) == "1" and files


def _check_second_release_is_refused(machine, own_data, ledger):
    before = ledger.links()
    with pytest.raises(BudgetError, match=r"about 0\.\d+ is left"):
        release(own_data)
    assert ledger.links() == before
    assert len(list((machine / "releases").iterdir())) == 1
    assert sorted(r.info.status for r in runs() if r.data.tags.get("dpldm.kind") == "release") == ["FAILED", "FINISHED"]


def test_a_built_in_set_may_be_released_again_with_fresh_noise_and_sampled_again_for_free(machine, small_mnist, ledger):
    first, second = release(small_mnist), release(small_mnist)
    bundles = [machine / "releases" / r.release_id for r in (first, second)]
    weights = [load_file(b / "model" / "denoiser.safetensors") for b in bundles]
    name = max(weights[0], key=lambda k: weights[0][k].size)
    assert not np.allclose(weights[0][name], weights[1][name]), "equal seeds, fresh noise"

    before = ledger.links()
    again = [resample_pipeline(bundle=str(bundles[0]), num_samples=20, seed=s) for s in (5, 5, 6)]
    again.append(resample_pipeline(bundle=str(bundles[0]), num_samples=20, seed=5, guidance=6.0))
    assert ledger.links() == before, "sampling is post-processing"
    images = [read_synthetic(machine / "releases" / r.release_id)[0] for r in again]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[3]), "guided"
    of_guided = [
        resample_pipeline(bundle=again[3].bundle, num_samples=20, seed=5, **g) for g in ({}, {"guidance": 8.0})
    ]
    own, first_again = (read_synthetic(machine / "releases" / r.release_id)[0] for r in of_guided)
    assert np.array_equal(own, images[3]) and np.array_equal(first_again, images[0]), "its own, or the preset's"
    found = verify_bundle(machine / "releases" / again[0].release_id)
    assert found.report.parent_release_id == first.release_id
    assert (again[0].epsilon, again[0].delta) == (first.epsilon, first.delta)


def test_noised_latents(machine, small_mnist, ledger):
    result = release(small_mnist, latent_mechanism="noised_latents")
    report = verify_bundle(machine / "releases" / result.release_id).report
    assert report.neighboring_relation == "REPLACE_ONE" and report.epsilon == report.epsilon_replace_one
    assert [e.stage for e in report.events] == ["train_autoencoder", "extract_latents", "extract_labels"]
    assert 4.95 <= result.epsilon <= 5.0
    assert ledger.books().spent("mnist") == pytest.approx(result.epsilon, abs=1e-9)
    resampled = resample_pipeline(bundle=result.bundle, num_samples=10)
    assert verify_bundle(resampled.bundle).num_samples == 10


@pytest.mark.parametrize("kind", ["rgb", "unlabelled", "persons", "empty class"])
def test_other_kinds_of_data(machine, kind):
    arrays = dict(zip(("images", "labels"), drawings(400, (8, 12, 3) if kind == "rgb" else (9, 8, 1)), strict=True))
    if kind == "unlabelled":
        del arrays["labels"]
    if kind == "persons":
        arrays["group"] = np.arange(400) * 3 // 4
    np.savez(machine / "x.npz", **arrays)
    (machine / "c.yaml").write_text("num_classes: 4\n" if kind == "empty class" else "seed: 1\n")
    result = release(str(machine / "x.npz"), config=str(machine / "c.yaml"))
    bundle = machine / "releases" / result.release_id
    report = verify_bundle(bundle).report
    images, labels = read_synthetic(bundle)
    assert images.shape[1:] == arrays["images"].shape[1:]
    assert (labels is None) == (kind == "unlabelled")
    assert report.unit_of_privacy == ("one person (at most 4 records)" if kind == "persons" else "one record")


def test_config_file_overrides_single_fields(machine, small_mnist):
    """At the edges of what is allowed: the largest seed, fewer images than shards."""
    (machine / "c.yaml").write_text(f"seed: {2**62 - 1}\nrelease_id: named\nsampling: {{num_shards: 3}}\n")
    result = release(small_mnist, config=str(machine / "c.yaml"), num_samples=1)
    assert verify_bundle(machine / "releases" / "named").num_samples == 1
    assert result.release_id == "named"
    config = json.loads((machine / "releases" / "named" / "config.json").read_text())
    assert config["seed"] == 2**62 - 1 and config["sampling"]["num_shards"] == 3
    with pytest.raises(BundleError, match="named already exists"):
        release(small_mnist, config=str(machine / "c.yaml"))


def test_stages_with_share_0_are_neither_billed_nor_booked(machine, small_mnist, ledger):
    """The prior alone pays; classes are those that images were drawn for, so there is no teacher in the bundle."""
    nothing = "dp_sgd: {budget_share: 0}"
    shares = f"autoencoder: {{{nothing}}}\nprior: {{budget_share: 1}}\ndiffusion: {{{nothing}}}\n"
    (machine / "c.yaml").write_text(f"{shares}teacher: {{{nothing}, from_prior: false}}\n")
    result = release(small_mnist, config=str(machine / "c.yaml"))
    bundle = machine / "releases" / result.release_id
    found = verify_bundle(bundle, strict=True)
    assert [e.stage for e in found.report.events] == PRIOR and 4.95 <= result.epsilon <= 5.0
    [entry] = ledger.books().entries.values()
    assert list(entry.stages) == PRIOR and entry.state == "published"
    assert {p.stem for p in (bundle / "model").iterdir()} == {"decoder", "denoiser"}
    assert read_synthetic(bundle)[1].tolist() == list(range(10)) * 4
    assert verify_bundle(resample_pipeline(bundle=result.bundle, num_samples=10).bundle).num_samples == 10


def test_samples_of_the_prior_teach_names_that_cost_nothing(machine, small_mnist, ledger):
    (machine / "c.yaml").write_text("prior: {budget_share: 0.65}\nteacher: {dp_sgd: {budget_share: 0}}\n")
    result = release(small_mnist, config=str(machine / "c.yaml"))
    bundle = machine / "releases" / result.release_id
    found = verify_bundle(bundle, strict=True)
    assert [e.stage for e in found.report.events] == STAGES[:-1] and 4.95 <= result.epsilon <= 5.0
    [entry] = ledger.books().entries.values()
    assert "train_teacher" not in entry.stages and entry.state == "published"
    assert {p.stem for p in (bundle / "model").iterdir()} == {"decoder", "denoiser", "teacher"}
    assert verify_bundle(resample_pipeline(bundle=result.bundle, num_samples=10).bundle).num_samples == 10


def test_two_teachers_are_billed_and_booked_and_the_second_is_published(machine, small_mnist, ledger):
    settings = "{fine_tuned: true, num_copies: 1, first_share: 0.05, dp_sgd: {learning_rate: 0.003, budget_share: 0.1}}"
    (machine / "c.yaml").write_text(f"teacher: {settings}\n")
    result = release(small_mnist, config=str(machine / "c.yaml"))
    bundle = machine / "releases" / result.release_id
    found = verify_bundle(bundle, strict=True)
    expected = [*STAGES[:-1], "train_first_teacher", "train_teacher"]
    assert [e.stage for e in found.report.events] == expected and 4.95 <= result.epsilon <= 5.0
    [entry] = ledger.books().entries.values()
    assert sorted(entry.stages) == sorted(expected) and entry.state == "published"
    assert {p.stem for p in (bundle / "model").iterdir()} == {"decoder", "denoiser", "teacher"}
    assert "`train_first_teacher`" in (bundle / "README.md").read_text()
    assert verify_bundle(resample_pipeline(bundle=result.bundle, num_samples=10).bundle).num_samples == 10


# What goes wrong


BAD_INPUTS = {
    "epsilon zero": ({"epsilon": 0.0}, ConfigError, r"epsilon=0\.0 must be a finite number above 0"),
    "epsilon negative": ({"epsilon": -1.0}, ConfigError, "epsilon=-1"),
    "epsilon nan": ({"epsilon": float("nan")}, ConfigError, "epsilon=nan"),
    "delta zero": ({"delta": 0.0}, ConfigError, r"delta=0\.0 must lie in \(0, 1\)"),
    "delta one": ({"delta": 1.0}, ConfigError, "delta=1"),
    "delta above 1/N": ({"delta": 0.01}, ConfigError, r"delta=0\.01 must be below 1 / \(number of records\)"),
    "dataset": ({"dataset": "mnits"}, ConfigError, "dataset='mnits' is unknown; did you mean 'mnist'"),
    "preset": ({"preset": "quik"}, ConfigError, "preset='quik' is unknown; did you mean 'quick'"),
    "mechanism": ({"latent_mechanism": "dpsgd"}, ConfigError, "did you mean 'dp_sgd'"),
    "num_samples": ({"num_samples": -1}, ConfigError, "num_samples=-1"),
    "budget": ({"budget_epsilon": -2.0}, ConfigError, r"budget_epsilon=-2\.0"),
    "missing config": ({"config": "nowhere.yaml"}, ConfigError, r"config='nowhere\.yaml' cannot be read"),
    "missing file": ({"dataset": "nowhere/scans.npz"}, DataError, r"nowhere/scans\.npz"),
    "out is a file": ({"out": "a-file"}, BundleError, "a-file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_clear_error_before_anything_is_spent(machine, small_mnist, ledger, case):
    inputs, error, message = BAD_INPUTS[case]
    (machine / "a-file").write_text("")
    with pytest.raises(error, match=message):
        release(inputs.get("dataset", small_mnist), **{k: v for k, v in inputs.items() if k != "dataset"})
    assert all(entry.state == "cancelled" for entry in ledger.books().entries.values())
    assert not (machine / "releases").exists()
    assert all(run.info.status == "FAILED" for run in runs())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusion: {widht: 3}", r"config key='diffusion\.widht' is unknown; did you mean 'diffusion\.width'"),
        ("diffusion: {width: 1}", r"diffusion\.width=1: .*greater than or equal to 8"),
        ("prior: {budget_share: 0.9}", "budget shares .* sum to 1.4, not 1"),
        ("- 1", "must hold a mapping"),
        ("autoencoder: {dp_sgd: {sample_rate: 0.0001}}", "too few records: .* expected batch of"),
    ],
)
def test_bad_config_files(machine, small_mnist, ledger, text, message):
    (machine / "c.yaml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        release(small_mnist, config=str(machine / "c.yaml"))
    assert all(entry.state == "cancelled" for entry in ledger.books().entries.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"labels": np.arange(5)}, "one label per image"),
        ({"labels": np.arange(347) % 3 * 2}, "no image of class"),
        ({"images": np.full((347, 8, 8), np.nan)}, "pixels are NaN"),
        ({"images": drawings(30)[0], "labels": drawings(30)[1]}, "too few records"),
    ],
)
def test_bad_data_lifts_the_hold(machine, own_data, ledger, damage, message):
    images, labels = drawings(NUM_RECORDS)
    np.savez(own_data, **{"images": images, "labels": labels} | damage)
    with pytest.raises(DataError, match=message):
        release(own_data)
    assert [entry.state for entry in ledger.books().entries.values()] == ["cancelled"]
    assert ledger.books().left(own_data) > 4.9


def test_the_budget_is_asked_before_the_data_is_opened(machine, own_data, ledger):
    """Reserve comes before the first read: with nothing left, a damaged file is not even noticed."""
    ledger.open_account(own_data, budget_epsilon=5.0, delta=1e-5, relation="ADD_OR_REMOVE_ONE")
    promise = {"epsilon": 4.9, "delta": 1e-5, "relation": "ADD_OR_REMOVE_ONE", "config_digest": "s"}
    ledger.reserve(own_data, release_id="r", execution_id="e", **promise)
    (machine / "scans.npz").write_bytes(b"damaged")
    with pytest.raises(BudgetError, match="does not cover"):
        release(own_data)


def test_another_attempt_at_opening_keeps_the_name_that_the_first_one_reserved(machine, own_data, ledger):
    inputs = {"dataset": own_data, "epsilon": 5.0, "delta": 1e-5, "preset": "smoke", "num_samples": 40}
    inputs |= {"latent_mechanism": "dp_sgd", "budget_epsilon": 0.0, "out": str(machine / "releases"), "config": ""}
    first, again = (open_release(**inputs, publish_metrics=False).release for _ in range(2))
    [entry] = ledger.books().entries.values()
    assert first.release_id == again.release_id == entry.release_id
    assert first.run_id == again.run_id and [r.info.run_name for r in runs()] == [entry.release_id]
    assert first.entry_id == again.entry_id == entry.entry_id


def test_a_point_of_a_sweep_that_is_refused_closes_no_other_one(machine, own_data, ledger):
    """They share one execution, and on a cluster they run side by side."""
    inputs = {"dataset": own_data, "delta": 1e-5, "preset": "smoke", "num_samples": 40, "latent_mechanism": "dp_sgd"}
    inputs |= {"budget_epsilon": 5.0, "out": str(machine / "releases"), "config": "", "publish_metrics": False}
    running = open_release(**inputs, epsilon=5.0).release
    with pytest.raises(BudgetError, match="does not cover"):
        open_release(**inputs, epsilon=4.0)
    [entry] = ledger.books().entries.values()
    assert (entry.entry_id, entry.state) == (running.entry_id, "reserved")
    assert sorted(r.info.status for r in runs()) == ["FAILED", "RUNNING"]
    close_failed_release(**inputs, epsilon=4.0)
    assert ledger.books().entry(running.entry_id).state == "reserved"
    close_failed_release(**inputs, epsilon=5.0)
    assert ledger.books().entry(running.entry_id).state == "cancelled"
    assert [r.info.status for r in runs()] == ["FAILED", "FAILED"]


def test_a_sweep_that_fails_leaves_no_point_open(machine, own_data, ledger):
    """On a cluster it stops the points that run, and their own failure handlers with them."""
    shared = {"dataset": own_data, "delta": 1e-5, "preset": "smoke", "num_samples": 40, "budget_epsilon": 6.0}
    shared |= {"out": str(machine / "releases"), "config": ""}
    for epsilon in (3.0, 2.0):
        open_release(**shared, epsilon=epsilon, latent_mechanism="dp_sgd", publish_metrics=False)
    assert [r.info.status for r in runs()] == ["RUNNING", "RUNNING"]
    close_failed_sweep(**shared, epsilons=[3.0, 2.0])
    assert {e.state for e in ledger.books().entries.values()} == {"cancelled"}
    assert [r.info.status for r in runs()] == ["FAILED", "FAILED"]


def test_nothing_is_written_of_a_release_whose_books_are_not_whole(machine, small_mnist, ledger, monkeypatch):
    begin_stage = Ledger.begin_stage

    def forgetful(self, entry_id, stage, **digests):
        """Hands out a key for the teacher without a debit."""
        return SecretKey.generate() if stage == "train_teacher" else begin_stage(self, entry_id, stage, **digests)

    monkeypatch.setattr(Ledger, "begin_stage", forgetful)
    with pytest.raises(LedgerError, match=r"\['train_teacher'\] never began"):
        release(small_mnist)
    assert not (machine / "releases").exists() or list((machine / "releases").iterdir()) == []


def test_unreachable_stores_are_named(machine, small_mnist, ledger, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_URI='http://127\.0\.0\.1:9' does not answer"):
        release(small_mnist)
    assert ledger.links() == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{machine / 'mlflow.db'}")
    monkeypatch.setenv("DPLDM_LEDGER_URL", "postgresql://127.0.0.1:9/x")
    with pytest.raises(LedgerError, match=r"postgresql://127\.0\.0\.1:9/x"):
        release(small_mnist)
    assert runs() == []


def test_what_only_measures_takes_no_release_with_it(machine, small_mnist, monkeypatch):
    """It was paid for, and waits only to be published."""

    def fail(*args, **kwargs):
        raise MemoryError("three matrices of a gigabyte")

    monkeypatch.setattr("dpldm_core.release.measuring.evaluate_files", fail)
    result = release(small_mnist, publish_metrics=True)
    assert verify_bundle(machine / "releases" / result.release_id).report.events[-1].stage == "released_accuracy"
    [run] = [r for r in runs() if r.info.run_name == "evaluate"]
    assert run.data.params["failed"] == "MemoryError('three matrices of a gigabyte')"


@pytest.mark.parametrize(
    ("broken", "state"),
    [("pretrain_autoencoder", "failed"), ("sample_images", "failed"), ("ingest_dataset", "cancelled")],
)
def test_a_stage_that_fails_leaves_the_books_truthful(machine, small_mnist, ledger, monkeypatch, broken, state):
    import dpldm_core.data.ingest
    import dpldm_core.training.stages

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is on fire")

    place = dpldm_core.data.ingest if broken == "ingest_dataset" else dpldm_core.training.stages
    monkeypatch.setattr(place, broken, fail)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        release(small_mnist)
    [entry] = ledger.books().entries.values()
    assert entry.state == state
    assert (ledger.books().spent("mnist") > 4.9) == (state == "failed"), "what a mechanism may have read stays booked"
    assert not list((machine / "releases").glob("*")) if (machine / "releases").exists() else True
    statuses = {r.info.run_name: r.info.status for r in runs()}
    assert "RUNNING" not in statuses.values() and statuses[entry.release_id] == "FAILED"
