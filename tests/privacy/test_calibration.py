import inspect
import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dpldm_core.errors import AccountingError, ConfigError
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.accounting import TRUNCATION_DELTA_SHARE, NeighboringRelation, epsilon
from dpldm_core.privacy.calibration import (
    calibrate,
    dp_sgd_multiplier,
    gaussian_multiplier,
    plan_release,
    truncation_probability,
)
from dpldm_core.privacy.plan import (
    DpSgdPlan,
    GaussianRecordPlan,
    GaussianSumPlan,
    HistogramPlan,
    LabelPlan,
    chernoff_cap,
)

DELTA = 1e-5
PRIOR = ["latent_means", "latent_covariances"]


def sgd(stage="sgd", **changes):
    fields = {"sample_rate": 0.05, "num_steps": 50, "max_grad_norm": 0.1, "noise_multiplier": 1.0}
    return DpSgdPlan(stage=stage, truncation_probability=1e-12, **fields | changes)


def one_sum(stage="sum"):
    return GaussianSumPlan(stage=stage, max_norm=1.0, noise_multiplier=1.0)


def calibrated(*mechanisms, target=8.0, relation="ADD_OR_REMOVE_ONE", delta=DELTA):
    return calibrate(mechanisms, target_epsilon=target, delta=delta, relation=relation, unit_of_privacy="one record")


def config(mechanism="dp_sgd", target=3.0, publish_metrics=False, **overrides):
    return resolve_config(
        dataset="d",
        epsilon=target,
        delta=DELTA,
        preset="smoke",
        num_samples=0,
        latent_mechanism=mechanism,
        public_num_records=2000,
        publish_metrics=publish_metrics,
        overrides=overrides,
    )


@cache
def two_stages(target, relation):
    stages = (sgd("a"), 0.3), (one_sum("b"), 0.2), (sgd("c", num_steps=100), 0.5)
    return calibrated(*stages, target=target, relation=relation)


@pytest.mark.parametrize(
    ("target", "relation"), [(0.3, "ADD_OR_REMOVE_ONE"), (4.0, "ADD_OR_REMOVE_ONE"), (3.0, "REPLACE_ONE")]
)
def test_the_target_is_met_and_never_exceeded(target, relation):
    plan = two_stages(target, relation)
    assert 0.998 * target <= plan.epsilon() <= target
    assert epsilon([m.event() for m in plan.mechanisms], DELTA, NeighboringRelation[relation]) == plan.epsilon()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_shares_divide_the_squared_gaussian_dp_parameter(share):
    """Closed form (Dong et al. 2022, Corollary 2): mu_1 and mu_2 together are sqrt(mu_1^2 + mu_2^2)."""
    plan = calibrated((one_sum("a"), share), (one_sum("b"), 1 - share))
    mu = [1 / m.noise_multiplier for m in plan.mechanisms]
    assert mu[0] ** 2 / (mu[0] ** 2 + mu[1] ** 2) == pytest.approx(share, rel=1e-9)
    total = math.hypot(*mu)
    exact = norm.cdf(total / 2 - 8.0 / total) - math.exp(8.0) * norm.cdf(-total / 2 - 8.0 / total)
    assert 0.97 * DELTA < exact <= DELTA


def test_nothing_but_noise_is_changed():
    before, after = sgd("a"), two_stages(4.0, "ADD_OR_REMOVE_ONE").mechanisms[0]
    changed = {k for k, v in after.model_dump().items() if v != before.model_dump()[k]}
    assert changed == {"noise_multiplier", "truncation_probability"}


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.6, 0.6), (1.0, 0.5)])
def test_shares_that_do_not_sum_to_one_are_refused(shares):
    with pytest.raises(ConfigError, match="not 1"):
        calibrated((one_sum("a"), shares[0]), (one_sum("b"), shares[1]))


def test_disagreeing_accountants_stop_a_calibration(monkeypatch):
    monkeypatch.setattr("dpldm_core.privacy.opacus_backend.prv_epsilon", lambda *a: (9.0, 9.1))
    with pytest.raises(AccountingError, match="disagree"):
        calibrated((one_sum(), 1.0))


def cut_batches_cost(plan, eps):
    """Delta that all truncated batches together cost: (1 + e^epsilon) times their total variation."""
    cut = sum(m.num_steps * m.truncation_probability for m in plan.mechanisms if isinstance(m, DpSgdPlan))
    return (1 + math.exp(eps)) * cut


@pytest.mark.parametrize(
    ("target", "relation"), [(0.3, "ADD_OR_REMOVE_ONE"), (4.0, "ADD_OR_REMOVE_ONE"), (3.0, "REPLACE_ONE")]
)
def test_cut_batches_fit_the_share_of_delta_kept_for_them(target, relation):
    plan = two_stages(target, relation)
    assert cut_batches_cost(plan, plan.epsilon()) <= TRUNCATION_DELTA_SHARE * DELTA
    for m in (plan.mechanisms[0], plan.mechanisms[2]):  # the exact binomial tail is below what the plan allows
        for n in (16, 1000, 60_000):
            assert binom.sf(m.batch_cap(n), n, m.sample_rate) <= m.truncation_probability


def test_cut_batches_fit_that_share_under_replace_one_too():
    plan = two_stages(4.0, "ADD_OR_REMOVE_ONE")
    assert cut_batches_cost(plan, plan.epsilon(NeighboringRelation.REPLACE_ONE)) <= TRUNCATION_DELTA_SHARE * DELTA


@given(st.floats(1e-12, 0.5), st.floats(0.01, 50), st.integers(1, 10**6))
def test_four_stages_of_cut_batches_fit_the_share(delta, eps, steps):
    tau = truncation_probability(delta=delta, epsilon=eps, num_steps=steps)
    assert 0 < tau <= 1e-9
    assert 4 * steps * tau * (1 + math.exp(eps)) <= TRUNCATION_DELTA_SHARE * delta * (1 + 1e-9)


@pytest.mark.parametrize("mu", [0.05, 0.5, 2.0])
def test_starting_points_are_about_right(mu):
    """They split a budget and are never charged: still, mu-GDP by Bu et al. (2020) is what the accountant finds."""
    delta_of = lambda eps: norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)  # noqa: E731
    sigma = dp_sgd_multiplier(mu, sample_rate=0.01, num_steps=4000)
    spent = epsilon(
        [sgd(sample_rate=0.01, num_steps=4000, noise_multiplier=sigma).event()],
        DELTA,
        NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    assert delta_of(0.7 * spent) > DELTA > delta_of(1.4 * spent)
    assert gaussian_multiplier(mu) == 1 / mu


# Releases


def test_without_labels_there_is_no_teacher_and_its_share_goes_to_the_others():
    labelled, plain = (plan_release(config(), num_classes=k, latent_dim=16, grouped=False) for k in (10, 1))
    assert plain.stages() == labelled.stages()[:-1] == ["train_autoencoder", *PRIOR, "train_diffusion"]
    assert 0.998 * 3 <= plain.epsilon() <= 3
    assert all(
        plain.mechanism(stage).noise_multiplier < labelled.mechanism(stage).noise_multiplier for stage in plain.stages()
    )


@pytest.mark.parametrize("left_out", ["autoencoder", "diffusion", "teacher"])
def test_a_stage_with_share_0_is_not_in_the_bill_and_the_rest_gets_all(left_out):
    shares = {"autoencoder": 0.1, "prior": 0.5, "diffusion": 0.2, "teacher": 0.2}
    shares = shares | {left_out: 0.0, "prior": 0.5 + shares[left_out]}
    overrides = {name: {"dp_sgd": {"budget_share": share}} for name, share in shares.items()}
    overrides["prior"] = {"budget_share": shares["prior"]}
    plan = plan_release(config(**overrides), num_classes=10, latent_dim=16, grouped=False)
    everything = ["train_autoencoder", *PRIOR, "train_diffusion", "train_teacher"]
    assert plan.stages() == [stage for stage in everything if stage != f"train_{left_out}"]
    assert 0.998 * 3 <= plan.epsilon() <= 3


def test_the_prior_s_budget_is_divided_between_means_and_covariances():
    """Squared Gaussian-DP parameters: mu is one over the noise multiplier."""
    prior = {"budget_share": 0.5, "mean_share": 0.3}
    plan = plan_release(config(prior=prior), num_classes=10, latent_dim=16, grouped=False)
    means, covariances = (plan.mechanism(stage).noise_multiplier ** -2 for stage in PRIOR)
    assert means / (means + covariances) == pytest.approx(0.3)
    other = plan_release(config(prior=prior | {"mean_share": 0.1}), num_classes=10, latent_dim=16, grouped=False)
    both = sum(other.mechanism(stage).noise_multiplier ** -2 for stage in PRIOR)
    assert both == pytest.approx(means + covariances, rel=5e-3)  # the split costs nothing: it is one budget


def test_a_first_teacher_is_billed_beside_the_second():
    teacher = {"first_share": 0.05, "dp_sgd": {"budget_share": 0.1}}
    labelled, plain = (
        plan_release(config(teacher=teacher), num_classes=k, latent_dim=16, grouped=False) for k in (10, 1)
    )
    others = ["train_autoencoder", *PRIOR, "train_diffusion"]
    assert labelled.stages() == [*others, "train_first_teacher", "train_teacher"] and plain.stages() == others
    for plan in (labelled, plain):
        assert 0.998 * 3 <= plan.epsilon() <= 3
    first, second = (labelled.mechanism(stage) for stage in labelled.stages()[-2:])
    assert first.noise_multiplier > second.noise_multiplier
    same = {"stage": "", "noise_multiplier": 1.0}
    assert first.model_copy(update=same) == second.model_copy(update=same)


def test_a_first_teacher_without_a_second_is_refused():
    teacher = {"first_share": 0.15, "dp_sgd": {"budget_share": 0.0}}
    with pytest.raises(ConfigError, match=r"teacher\.first_share=0\.15 pays for .* set both to 0, or both above"):
        plan_release(config(teacher=teacher), num_classes=10, latent_dim=16, grouped=False)


def test_a_release_bills_every_stage_that_reads_private_data():
    plan = plan_release(config(), num_classes=10, latent_dim=16, grouped=False)
    assert [(m.stage, type(m)) for m in plan.mechanisms] == [
        ("train_autoencoder", DpSgdPlan),
        ("latent_means", GaussianSumPlan),
        ("latent_covariances", GaussianSumPlan),
        ("train_diffusion", DpSgdPlan),
        ("train_teacher", DpSgdPlan),
    ]
    assert plan.relation == "ADD_OR_REMOVE_ONE" and plan.unit_of_privacy == "one record"
    assert 0.998 * 3 <= plan.epsilon() <= 3
    parts = {"train_autoencoder": config().autoencoder, "train_diffusion": config().diffusion}
    for stage, part in (parts | {"train_teacher": config().teacher}).items():
        for field in ("sample_rate", "num_steps", "max_grad_norm"):
            assert getattr(plan.mechanism(stage), field) == getattr(part.dp_sgd, field)
        tau = plan.mechanism(stage).truncation_probability  # the cap follows from the declared 2,000 records
        assert plan.mechanism(stage).max_batch_size == min(2000, chernoff_cap(2000, part.dp_sgd.sample_rate, tau))


def test_released_latents_meet_their_target_under_replace_one():
    plan = plan_release(config("noised_latents"), num_classes=10, latent_dim=16, grouped=False)
    assert plan.relation == "REPLACE_ONE"
    assert 0.998 * 3 <= plan.epsilon() <= 3


@pytest.fixture
def uncalibrated(monkeypatch):
    """Plans whose shape is right and whose noise is not: for what calibration does not touch."""
    monkeypatch.setattr("dpldm_core.privacy.calibration.solve_scale", lambda *a: 1.0)
    monkeypatch.setattr("dpldm_core.privacy.accounting.cross_check", lambda *a: {})


@pytest.mark.parametrize(
    ("classes", "kinds"), [(1, [DpSgdPlan, GaussianRecordPlan]), (10, [DpSgdPlan, GaussianRecordPlan, LabelPlan])]
)
def test_labels_are_billed_when_there_are_any(uncalibrated, classes, kinds):
    plan = plan_release(config("noised_latents"), num_classes=classes, latent_dim=16, grouped=False)
    assert [type(m) for m in plan.mechanisms] == kinds
    assert plan.mechanisms[1].max_norm == pytest.approx(config().prior.clip_norm * math.sqrt(16))


@pytest.mark.parametrize("mechanism", ["dp_sgd", "noised_latents"])
def test_a_person_is_one_unit(uncalibrated, mechanism):
    settings = config(mechanism, max_records_per_group=3)
    plan = plan_release(settings, num_classes=10, latent_dim=16, grouped=True)
    assert plan.unit_of_privacy == "one person (at most 3 records)"
    if mechanism == "noised_latents":
        assert plan.mechanism("extract_labels").labels_per_unit == 3
        assert plan.mechanism("extract_latents").max_norm == pytest.approx(settings.prior.clip_norm * math.sqrt(16 * 3))


def test_the_labels_of_a_person_are_all_charged():
    """That all M labels are kept is exp(M epsilon_0) times as likely, with probability c: epsilon is at least
    M epsilon_0 + ln(1 - delta / c), whatever else is released."""
    shares = {"autoencoder_share": 0.01, "label_share": 0.98}
    settings = config("noised_latents", max_records_per_group=4, noised_latents=shares)
    plan = plan_release(settings, num_classes=10, latent_dim=16, grouped=True)
    p = plan.mechanisms[2].noise_parameter
    kept, turned = 1 - p + p / 10, p / 10
    assert plan.epsilon() >= 4 * math.log(kept / turned) + math.log1p(-DELTA / kept**4)


def test_a_plan_follows_from_declared_facts_alone():
    """Sample rate from the private N: no count of records is asked for; only the declared one moves the rate."""
    assert set(inspect.signature(plan_release).parameters) == {"config", "num_classes", "latent_dim", "grouped"}
    for declared, batch in ((1000, 512), (4000, 512), (60_000, 1024)):
        rate = config(num_records=declared).diffusion.dp_sgd.sample_rate
        assert rate == min(0.5, batch / declared)


@pytest.mark.parametrize("mechanism", ["dp_sgd", "noised_latents"])
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_a_published_accuracy_takes_its_share_and_no_more(mechanism, share):
    """Of the squared Gaussian-DP parameter, beside another one-shot mechanism; the asked epsilon covers both."""
    plain = plan_release(config(mechanism), num_classes=10, latent_dim=16, grouped=False)
    settings = config(mechanism, publish_metrics=True, evaluation={"metrics_share": share})
    plan = plan_release(settings, num_classes=10, latent_dim=16, grouped=False)
    assert [m.stage for m in plan.mechanisms] == [*(m.stage for m in plain.mechanisms), "released_accuracy"]
    assert 0.998 * 3 <= plan.epsilon() <= 3 and plan.relation == plain.relation
    histogram, beside = plan.mechanisms[-1], plan.mechanisms[1]
    assert isinstance(histogram, HistogramPlan) and histogram.num_bins == 2
    own = (
        settings.prior.budget_share * settings.prior.mean_share if mechanism == "dp_sgd" else 0.6
    )  # of the preset: 1 - 0.1 - 0.3
    ratio = (beside.noise_multiplier / histogram.noise_multiplier) ** 2
    assert ratio == pytest.approx(share / ((1 - share) * own), rel=1e-9)
    without = plan.model_copy(update={"mechanisms": plan.mechanisms[:-1]})
    assert without.epsilon() < plan.epsilon()


def test_a_person_s_held_out_records_are_all_charged(uncalibrated):
    settings = config(publish_metrics=True, max_records_per_group=3)
    for grouped, most in ((True, 3), (False, 1)):
        plan = plan_release(settings, num_classes=10, latent_dim=16, grouped=grouped)
        assert plan.mechanism("released_accuracy").max_records_per_unit == most


def test_an_accuracy_without_labels_is_refused():
    with pytest.raises(ConfigError, match="needs labels"):
        plan_release(config(publish_metrics=True), num_classes=1, latent_dim=16, grouped=False)
