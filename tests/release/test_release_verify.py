import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpldm_core.data.schema import ImageSchema
from dpldm_core.errors import BundleError
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.calibration import COVARIANCES, MEANS, plan_release
from dpldm_core.privacy.report import build_report
from dpldm_core.release.bundle import MANIFEST, canonical_json, seal, write_bundle
from dpldm_core.release.card import render_card
from dpldm_core.release.sampling import public_config
from dpldm_core.release.synthetic import write_synthetic_parquet
from dpldm_core.release.verify import main, verify_bundle
from tests.release.conftest import CLASSES, NUM_SAMPLES

FILES = [
    "synthetic/part-00000-of-00002.parquet",
    "synthetic/part-00001-of-00002.parquet",
    "model/decoder.safetensors",
    "model/denoiser.safetensors",
    "config.json",
    "privacy_report.json",
    "README.md",
    "samples.png",
    "manifest.json",
]
REPORT = "privacy_report.json"


def problems(folder, **options):
    with pytest.raises(BundleError) as caught:
        verify_bundle(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("strict", [False, True])
def test_an_honest_bundle_verifies(folder, parts, strict):
    found = verify_bundle(folder, strict=strict)
    assert found.report == parts["report"]
    assert (found.release_id, found.num_samples, found.num_files) == ("r1", 7, 9)
    assert found.manifest_sha256 == json.loads((folder / MANIFEST).read_bytes())["manifest_sha256"]


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_of_any_file_is_found(folder, name):
    path = folder / name
    honest = path.read_bytes()
    for offset in (0, len(honest) // 3, len(honest) // 2, len(honest) - 1):
        path.write_bytes(honest[:offset] + bytes([honest[offset] ^ 1]) + honest[offset + 1 :])
        assert name in problems(folder)
    for changed in (honest + b"\n", honest[:-1], b""):
        path.write_bytes(changed)
        assert name in problems(folder)
    path.write_bytes(honest)
    verify_bundle(folder)


def test_every_byte_of_the_manifest_counts(folder):
    path = folder / MANIFEST
    honest = path.read_bytes()
    assert all(honest[:i] + bytes([honest[i] ^ 1]) + honest[i + 1 :] != resealed(honest, i) for i in range(len(honest)))


def resealed(honest, i):
    """What verify would accept in place of the manifest with byte i changed, or b'' when it is no JSON object."""
    try:
        return seal(json.loads(honest[:i] + bytes([honest[i] ^ 1]) + honest[i + 1 :]))
    except (ValueError, AttributeError):
        return b""


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    assert name in problems(folder)


@pytest.mark.parametrize("name", ["encoder.safetensors", "synthetic/more.parquet", ".hidden", "notes/latents.npy"])
def test_an_extra_file_is_found_listed_or_not(folder, rewrite, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert f"{name} is not listed in manifest.json" in problems(folder)
    rewrite(folder, "README.md", lambda text: text)  # lists the new file
    assert f"{name} is no part of a bundle" in problems(folder)


def test_links_are_no_files(folder, tmp_path):
    target = tmp_path / "outside.png"
    (folder / "samples.png").rename(target)
    (folder / "samples.png").symlink_to(target)
    assert "samples.png is not a plain file" in problems(folder)
    os.mkfifo(folder / "pipe")
    assert "pipe is not listed" in problems(folder)


def test_every_problem_is_listed(folder):
    (folder / "samples.png").write_bytes(b"")
    (folder / "README.md").unlink()
    (folder / "extra").write_bytes(b"")
    (folder / "config.json").write_text("{")
    said = problems(folder)
    assert said.count("\n  - ") >= 4
    assert all(name in said for name in ("samples.png", "README.md", "extra", "config.json"))


def forge_drop(report):
    report["events"] = report["events"][:1]


def forge_drop_and_state(report):
    """A consistent sentence over fewer events, but the old epsilon."""
    report["events"] = report["events"][:1]
    report["statement"] = report["statement"].replace("latent_means, latent_covariances", "latent_means")


def forge_noise(report):
    report["events"][0]["event"]["noise_multiplier"] = 1.0


def forge_epsilon(report):
    """Epsilon too small for its events, and a sentence that agrees."""
    old = f"{report['epsilon']:.3f}"
    report["epsilon"] = round(report["epsilon"] / 2, 3)
    report["statement"] = report["statement"].replace(old, f"{report['epsilon']:.3f}")


def forge_overstated(report):
    report["epsilon"] *= 1 + 1e-5


def forge_replace_one(report):
    report["epsilon_replace_one"] = report["epsilon"]


def forge_relation(report):
    report["neighboring_relation"] = "REPLACE_ONE"
    report["statement"] = report["statement"].replace(
        "ADD_OR_REMOVE_ONE (adding or removing one record)", "REPLACE_ONE (replacing one record by any other)"
    )


def forge_delta(report):
    report["delta"] = 1e-2
    report["statement"] = report["statement"].replace("1e-05", "0.01")


@pytest.mark.parametrize(
    "change",
    [
        forge_drop,
        forge_drop_and_state,
        forge_noise,
        forge_epsilon,
        forge_overstated,
        forge_replace_one,
        forge_relation,
        forge_delta,
    ],
)
def test_a_report_that_its_events_contradict_fails_with_every_hash_right(folder, rewrite, change):
    rewrite(folder, REPORT, change)
    said = problems(folder)
    assert "SHA-256" not in said and "manifest" not in said
    assert "but its events cost" in said


def test_both_numbers_are_named(folder, rewrite, parts):
    honest = parts["report"].epsilon
    rewrite(folder, REPORT, forge_epsilon)
    assert f"states epsilon = {round(honest / 2, 3)}, but its events cost {honest}" in problems(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(statement="This release is perfectly private."), "statement does not say"),
        (lambda r: r.update(unit_of_privacy="one pixel"), "statement does not say"),
        (lambda r: r.update(neighboring_relation="NONE"), "neighboring_relation"),
        (lambda r: r.update(events=[]), "events"),
        (lambda r: r.update(epsilon="0.9"), "epsilon"),
        (lambda r: r.update(epsilonn=0.1), "epsilonn"),
        (lambda r: r.pop("ledger") and None, "ledger"),
        (lambda r: r.update(latent_mechanism="noised_latents"), "REPLACE_ONE"),
        (lambda r: r.update(release_id="r2"), "release 'r1'"),
        (lambda r: r["events"][0].update(event={"class_name": "SecretDpEvent"}), "SecretDpEvent"),
        (lambda r: r["events"][0]["event"].update(noise_multiplier=-1.0), "non-negative"),
        (lambda r: r["events"][0]["event"].update(noise_multiplier=0.0), "events cost inf"),
        (lambda r: r["events"][0]["event"].update(noise_multiplier=[1.0]), "no epsilon can be computed"),
        (lambda r: r["events"][0].update(event={"class_name": "NonPrivateDpEvent"}), "events cost inf"),
    ],
)
def test_a_malformed_report_is_refused(folder, rewrite, change, says):
    rewrite(folder, REPORT, change)
    assert says in problems(folder)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("config.json", lambda c: c.update(epsilon=0.5), "exceeds the 0.5 asked for"),
        ("config.json", lambda c: c.update(delta=1e-6), "delta is 1e-06"),
        ("config.json", lambda c: c.update(latent_mechanism="noised_latents"), "latent_mechanism"),
        ("config.json", lambda c: c.update(num_samples=8), "holds 7 images"),
        ("config.json", lambda c: c.pop("epsilon") and None, "None asked for"),
        ("README.md", lambda text: text.replace(b"epsilon = 0.", b"epsilon = 0.0"), "does not carry the statement"),
        ("model/decoder.safetensors", lambda _: b"not tensors", "decoder.safetensors is not a safetensors file"),
        ("synthetic/part-00000-of-00002.parquet", lambda _: b"PAR1", "part-00000-of-00002.parquet cannot be read"),
    ],
)
def test_parts_that_contradict_each_other_fail_with_every_hash_right(folder, rewrite, name, change, says):
    rewrite(folder, name, change)
    said = problems(folder)
    assert says in said and "SHA-256" not in said


@functools.cache
def planned(mechanism, grouped):
    """A configuration with every stage, its schema and its plan."""
    config = resolve_config(
        dataset="mnist5k",
        epsilon=1.0,
        delta=1e-5,
        preset="smoke",
        num_samples=NUM_SAMPLES,
        latent_mechanism=mechanism,
        public_num_records=None,
        publish_metrics=False,
        overrides={"teacher": {"first_share": 0.05, "dp_sgd": {"budget_share": 0.1}}},
    )
    schema = ImageSchema(height=8, width=8, channels=1, class_names=tuple(CLASSES), labelled=True, grouped=grouped)
    plan = plan_release(config, num_classes=len(CLASSES), latent_dim=16, grouped=grouped)
    return config, schema, plan


@pytest.fixture
def bundle_of(tmp_path, parts):
    """Writes a bundle whose report, card and config are made from a plan: nothing but the two can contradict."""

    def write(config, schema, plan):
        mechanism = config.latent_mechanism
        report = build_report(
            plan, release_id="r2", account="a", entry="e", latent_mechanism=mechanism, public_facts={}
        )
        values = public_config(config, schema, 0.0, "mnist5k")
        card = render_card(report, values, dataset_title="t", num_samples=NUM_SAMPLES, class_names=CLASSES)
        return Path(
            write_bundle(tmp_path / "planned", "r2", **parts | {"config": values, "report": report, "card": card})
        )

    return write


def changed(plan, stage, /, **fields):
    """The plan with other fields of one stage, or without it."""
    mechanisms = [m.model_copy(update=fields) if m.stage == stage else m for m in plan.mechanisms]
    kept = [m for m in mechanisms if fields or m.stage != stage]
    return plan.model_copy(update={"mechanisms": tuple(kept)})


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mechanism", ["dp_sgd", "noised_latents"])
def test_events_that_follow_from_the_configuration_verify(bundle_of, mechanism, grouped):
    config, schema, plan = planned(mechanism, grouped)
    assert len(plan.mechanisms) == (6 if mechanism == "dp_sgd" else 3)
    assert verify_bundle(bundle_of(config, schema, plan)).report.epsilon <= 1.0


@pytest.mark.parametrize(
    ("mechanism", "stage", "fields", "says"),
    [
        ("dp_sgd", "train_autoencoder", {}, "'train_autoencoder', which is billed 0 times"),
        ("dp_sgd", "train_first_teacher", {}, "'train_first_teacher', which is billed 0 times"),
        ("dp_sgd", COVARIANCES, {}, f"{COVARIANCES!r}, which is billed 0 times"),
        ("dp_sgd", COVARIANCES, {"stage": MEANS}, f"{MEANS!r}, which is billed 2 times"),
        ("dp_sgd", "train_diffusion", {"num_steps": 1}, "train_diffusion is billed as"),
        ("dp_sgd", "train_diffusion", {"sample_rate": 0.001}, "train_diffusion is billed as"),
        ("dp_sgd", "train_teacher", {"stage": "train_pupil"}, "by config.json it is no private stage"),
        ("noised_latents", "extract_labels", {"labels_per_unit": 1}, "extract_labels is billed as"),
        ("noised_latents", "extract_labels", {"num_classes": 2}, "extract_labels is billed as"),
    ],
)
def test_a_bill_of_less_than_was_configured_fails_with_every_number_right(bundle_of, mechanism, stage, fields, says):
    config, schema, plan = planned(mechanism, True)
    said = problems(bundle_of(config, schema, changed(plan, stage, **fields)))
    assert says in said and "SHA-256" not in said and "events cost" not in said


def test_bundles_whose_prior_was_one_sum_still_verify(bundle_of, rewrite):
    config, schema, plan = planned("dp_sgd", False)
    bundle = bundle_of(config, schema, changed(changed(plan, COVARIANCES), MEANS, stage="latent_prior"))
    said = problems(bundle)  # settings of the second sum: it has run
    assert f"{MEANS!r}, which is billed 0 times" in said and f"{COVARIANCES!r}, which is billed 0 times" in said

    rewrite(
        bundle, "config.json", lambda c: [c["prior"].pop(name) for name in ("mean_share", "covariance_clip_norm")] and c
    )
    assert verify_bundle(bundle).report.events[1].stage == "latent_prior"


def test_a_unit_of_other_records_than_configured_is_refused(bundle_of):
    config, schema, plan = planned("dp_sgd", False)
    said = problems(bundle_of(config, schema, plan.model_copy(update={"unit_of_privacy": "all records of a hospital"})))
    assert "one unit is 'all records of a hospital', but by config.json it is 'one record'" in said


def test_a_delta_that_allows_to_publish_a_record_is_refused(bundle_of):
    config, schema, plan = planned("dp_sgd", False)
    said = problems(bundle_of(config.model_copy(update={"num_records": 200_000}), schema, plan))
    assert "delta=1e-05 must be below 1 / (number of records)" in said


@pytest.mark.parametrize("name", ["decoder", "denoiser"])
def test_a_bundle_without_its_models_is_refused(folder, rewrite, name):
    (folder / "model" / f"{name}.safetensors").unlink()
    rewrite(folder, "README.md", lambda text: text)  # the manifest lists it no more
    assert f"model/{name}.safetensors is missing" in problems(folder)


@pytest.mark.parametrize(("name", "from_prior"), [("private_latents", True), ("teacher", False)])
def test_a_model_that_no_stage_makes_is_refused(folder, rewrite, name, from_prior):
    model = (folder / "model" / "decoder.safetensors").read_bytes()
    (folder / "model" / f"{name}.safetensors").write_bytes(model)
    rewrite(folder, "config.json", lambda c: c["teacher"].update(from_prior=from_prior))
    assert f"model/{name}.safetensors is no model of this release" in problems(folder)


def test_the_teacher_of_the_prior_is_a_model_of_a_release_without_another(folder, rewrite):
    (folder / "model" / "teacher.safetensors").write_bytes((folder / "model" / "decoder.safetensors").read_bytes())
    rewrite(folder, "README.md", lambda text: text)
    verify_bundle(folder)


def test_a_dropped_part_is_missed_with_every_hash_right(folder, rewrite):
    (folder / "synthetic/part-00001-of-00002.parquet").unlink()
    rewrite(folder, "config.json", lambda config: config.update(num_samples=4))
    assert "part-00000-of-00001.parquet is missing" in problems(folder)


def test_strict_looks_at_every_image(folder, rewrite, tmp_path):
    """The second part holds images of another size: only decoding them all shows it."""
    other = tmp_path / "other.parquet"
    write_synthetic_parquet(other, np.zeros((3, 9, 9, 1), np.uint8), np.zeros(3, np.int64), ["a", "b", "c"])
    rewrite(folder, "synthetic/part-00001-of-00002.parquet", lambda _: other.read_bytes())
    assert "part-00001-of-00002.parquet holds images of (9, 9, 1), config.json has (8, 8, 1)" in problems(folder)
    assert "differ in size" in problems(folder, strict=True)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"labelled": False, "class_names": ["all"]},
            "holds the classes ('ankle boot', 'bag', 'coat'), config.json has None",
        ),
        ({"class_names": ["ankle boot", "bag"]}, "config.json has ('ankle boot', 'bag')"),
        ({"height": 9}, "holds images of (8, 8, 1), config.json has (9, 8, 1)"),
    ],
)
def test_images_are_those_of_the_schema_that_decides_the_bill(folder, rewrite, schema, message):
    """With one class, or none, no mechanism of labels and no teacher would be looked for."""
    rewrite(folder, "config.json", lambda config: config["schema"].update(schema))
    assert message in problems(folder)


def test_strict_looks_at_every_label(folder, rewrite, tmp_path):
    other = tmp_path / "other.parquet"
    images, labels = np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 3])
    write_synthetic_parquet(other, images, labels, [*CLASSES, "dress"])
    table = pq.read_table(other)
    metadata = pq.read_table(folder / "synthetic/part-00001-of-00002.parquet").schema.metadata
    pq.write_table(table.replace_schema_metadata(metadata), other)
    rewrite(folder, "synthetic/part-00001-of-00002.parquet", lambda _: other.read_bytes())
    verify_bundle(folder)
    assert "labels that are none of the 3 classes" in problems(folder, strict=True)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": NaN}', "[" * 100_000, '{"files": [1]}', "\ud800"])
@pytest.mark.parametrize("name", ["manifest.json", "config.json", REPORT])
def test_broken_json_is_said_not_raised(folder, name, text):
    (folder / name).write_text(text, errors="surrogatepass")
    assert name in problems(folder)


def test_duplicate_keys_cannot_hide_a_second_epsilon(folder, rewrite):
    """A reader that takes the first of two equal keys would see another number than one that takes the last."""
    path = folder / REPORT
    rewrite(folder, REPORT, lambda report: None)
    forged = path.read_bytes().replace(b'  "epsilon":', b'  "epsilon": 0.1,\n  "epsilon":')
    path.write_bytes(forged)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    import hashlib

    manifest["files"][REPORT] = {"sha256": hashlib.sha256(forged).hexdigest(), "size": len(forged)}
    (folder / MANIFEST).write_bytes(seal(manifest))
    assert "not in canonical form" in problems(folder)


def test_a_newer_format_is_named(folder):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(seal(manifest | {"format_version": 2}))
    assert "format_version=2" in problems(folder)
    assert canonical_json(manifest) == seal(manifest)


def test_command_line(folder, capsys):
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("r1", "ADD_OR_REMOVE_ONE", "one record", "epsilon", "1e-05", "9 files"))
    (folder / "samples.png").write_bytes(b"")
    assert main([str(folder), "--strict"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "samples.png" in printed.err
    assert main([str(folder / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_verify_runs_without_torch(folder):
    root = Path(__file__).parents[2]
    script = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('no torch here')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from dpldm_core.release.verify import main\n"
        "code = main([sys.argv[1]]); assert 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
