import json

import pytest

from dpldm_core.config import ReleaseConfig
from dpldm_core.errors import ConfigError
from dpldm_core.overrides import load_overrides
from dpldm_core.presets import MECHANISMS, PRESETS, check_delta, resolve_config
from dpldm_core.privacy.calibration import plan_release


def resolve(**changes):
    inputs = {
        "dataset": "mnist",
        "epsilon": 1.0,
        "delta": 1e-5,
        "preset": "quick",
        "num_samples": 0,
        "latent_mechanism": "dp_sgd",
        "public_num_records": 60_000,
    }
    return resolve_config(**inputs | changes)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_preset_resolves_and_survives_json(preset, mechanism):
    config = resolve(preset=preset, latent_mechanism=mechanism)
    assert ReleaseConfig.model_validate_json(config.model_dump_json()) == config
    assert config.num_samples == config.sampling.num_samples


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("epsilon", [0.2, 10.0])
def test_every_preset_is_calibrated_to_the_asked_epsilon(preset, mechanism, epsilon):
    """Not a penny more, and at most 0.2 % less."""
    config = resolve(preset=preset, latent_mechanism=mechanism, epsilon=epsilon)
    plan = plan_release(config, num_classes=10, latent_dim=196, grouped=False)
    assert 0.998 * epsilon <= plan.epsilon() <= epsilon


def test_the_rate_follows_from_the_declared_number_of_records():
    few, many = (resolve(public_num_records=n).diffusion.dp_sgd.sample_rate for n in (10_000, 60_000))
    assert few == pytest.approx(6 * many)
    assert resolve(public_num_records=None, overrides={"num_records": 10_000}).diffusion.dp_sgd.sample_rate == few
    assert resolve(public_num_records=200).diffusion.dp_sgd.sample_rate == 0.5


@pytest.mark.parametrize("spelling", [10_000, 1e4, "10000"])
def test_declared_records_count_however_they_are_spelled(spelling):
    """YAML reads 1e4 as text and JSON as a fraction; both are taken, so both must set the rate and bound delta."""
    config = resolve(public_num_records=None, overrides={"num_records": spelling})
    assert config == resolve(public_num_records=None, overrides={"num_records": 10_000})
    with pytest.raises(ConfigError, match=r"1 / \(number of records\)"):
        resolve(public_num_records=None, delta=1e-3, overrides={"num_records": spelling})


def test_no_shard_is_empty():
    assert [resolve(num_samples=n).num_shards for n in (1, 2, 1000)] == [1, 2, 2]


def test_quick_takes_half_as_long_with_few_records_and_cpu_does_not():
    def work(preset, num_records):
        config = resolve(preset=preset, public_num_records=num_records)
        private = config.diffusion.dp_sgd
        return (
            config.autoencoder.procedural_steps,
            config.diffusion.procedural_steps,
            round(private.num_steps * private.sample_rate * num_records),
            config.teacher.num_synthetic,
        )

    few, more = work("quick", 5_000), work("quick", 5_001)
    assert all(a < b for a, b in zip(few, more, strict=True)) and few[2] <= more[2] / 3
    assert work("quick", 4_000) == few and work("quick", 60_000) == more
    assert work("cpu", 5_000)[:2] == work("cpu", 60_000)[:2]


@pytest.mark.parametrize("preset", ["quick", "cpu", "long", "gpu"])
def test_few_records_or_little_epsilon_leave_the_teacher_out(preset):
    """From public facts alone: the declared or well-known number of records, and the asked epsilon."""
    for records, epsilon, taught in (
        (60_000, 1.0, True),
        (5_000, 10.0, True),
        (1_000, 10.0, False),
        (5_000, 1.0, False),
    ):
        config = resolve(preset=preset, public_num_records=records, epsilon=epsilon)
        assert (config.teacher.dp_sgd.budget_share > 0) == taught
        if preset == "quick":  # a plan takes seconds, and goes by the shares alone
            plan = plan_release(config, num_classes=10, latent_dim=196, grouped=False)
            assert ("train_teacher" in plan.stages()) == taught
    undeclared = [resolve(preset=preset, public_num_records=None, epsilon=e) for e in (1.0, 10.0)]
    assert [c.teacher.dp_sgd.budget_share > 0 for c in undeclared] == [False, True], "4,000 records are assumed"


@pytest.mark.parametrize("preset", ["quick", "cpu", "long", "gpu"])
def test_long_has_finer_latents_and_two_fine_tuned_teachers_where_budget_is_plenty(preset):
    """From public facts alone: 300,000 records times epsilon, not one less."""
    for records, epsilon, plenty in (
        (60_000, 10.0, True),
        (30_000, 10.0, True),
        (29_999, 10.0, False),
        (60_000, 1.0, False),
    ):
        config = resolve(preset=preset, public_num_records=records, epsilon=epsilon)
        twice = preset == "long" and plenty
        assert config.teacher.fine_tuned == (config.teacher.first_share > 0) == twice
        assert (config.prior.budget_share == 0.25) == (config.teacher.num_copies > 0) == twice
        assert (config.teacher.dp_sgd.learning_rate < 1) == twice, "for gradients of unit noise"
        assert (config.diffusion.dp_sgd.num_steps == 400) == (config.autoencoder.frequencies == 20) == twice
        assert (config.teacher.num_synthetic >= 60_000) == (preset == "long")
        if preset == "long":
            plan = plan_release(config, num_classes=10, latent_dim=196, grouped=False)
            assert ("train_first_teacher" in plan.stages()) == twice


def test_overrides_change_single_fields_only():
    config, plain = resolve(overrides={"diffusion": {"dp_sgd": {"num_steps": 7}}, "seed": 3}), resolve()
    assert (config.diffusion.dp_sgd.num_steps, config.seed) == (7, 3)
    changed = config.model_dump()
    changed["diffusion"]["dp_sgd"]["num_steps"] = plain.diffusion.dp_sgd.num_steps
    assert changed | {"seed": plain.seed} == plain.model_dump()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epsilonn": 1}, "config key='epsilonn' is unknown; did you mean 'epsilon'"),
        ({"sampling": {"etta": 1}}, r"did you mean 'sampling\.eta'"),
        ({"seed": -1}, "seed=-1"),
        ({"autoencoder": {"dp_sgd": {"sample_rate": 1.5}}}, r"autoencoder\.dp_sgd\.sample_rate=1\.5"),
        ({"autoencoder": 3}, "autoencoder=3"),
        ({"prior": {"clip_norm": float("nan")}}, r"prior\.clip_norm=nan"),
        ({"num_records": 0}, "num_records=0"),
        ({"num_records": "many"}, "num_records='many'"),
        ({"diffusion": {"width": 512}}, r"diffusion\.width=512"),
        ({"sampling": {"sigma_min": 3.0}}, r"^sampling: sigma_min=3 must be below sigma_max=2\.5$"),
        (
            {"noised_latents": {"autoencoder_share": 0.8}},
            r"^noised_latents: autoencoder_share \+ label_share = 1\.1 must be below 1",
        ),
        (
            {"performance": {"clip_backend": "opacus", "matmul_precision": "bfloat16"}},
            "^performance: clip_backend=opacus knows matmul_precision=float32 alone",
        ),
    ],
)
def test_unknown_and_impossible_values_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(overrides=overrides)


def test_delta_must_be_below_one_over_n():
    check_delta(1e-5, 99_999)
    with pytest.raises(ConfigError, match="would allow a mechanism that publishes one person's record"):
        check_delta(1e-5, 100_000)


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_override_files(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"seed": 3}))
    assert load_overrides(str(tmp_path / name)) == {"seed": 3}
    assert load_overrides("") == {}
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        load_overrides(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "scans.npz"),
        ("epsilon", 100.0),
        ("delta", 0.5),
        ("preset", "cpu"),
        ("latent_mechanism", "noised_latents"),
        ("num_samples", 5),
    ],
)
def test_what_the_request_was_checked_by_cannot_stand_in_the_file(name, value):
    """Else a file could put own data on the account of a public set, which has no cap."""
    with pytest.raises(ConfigError, match=f"{name} cannot stand in the file. Give --{name} instead"):
        resolve(overrides={"seed": 1, name: value})
