"""What is refused before any budget is spent because the budget would buy nothing."""

import re

import numpy as np
import pytest

from dpldm_core.errors import ConfigError
from dpldm_core.release.opening import account_name, check_request, decide


def decision(tmp_path, num_images, epsilon, preset="quick"):
    rng = np.random.default_rng(0)
    path = tmp_path / f"scans{num_images}.npz"
    np.savez(path, images=rng.integers(0, 256, (num_images, 12, 12), dtype=np.uint8), labels=np.arange(num_images) % 4)
    request = check_request(
        dataset=str(path),
        epsilon=epsilon,
        delta=1e-5,
        preset=preset,
        num_samples=0,
        latent_mechanism="dp_sgd",
        budget_epsilon=0.0,
        out=str(tmp_path / "releases"),
        config="",
    )
    return decide(request, data_root=None, cache_dir=None)


def test_an_epsilon_that_drowns_the_data_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match="the budget would buy nothing") as refused:
        decision(tmp_path, 600, 0.2)
    text = str(refused.value)
    assert "epsilon=0.2" in text and " records of 4 classes" in text
    epsilon = float(re.search(r"epsilon of about ([0-9.]+)", text)[1])
    records = int(re.search(r"about (\d+) records", text)[1])
    assert 0.2 < epsilon < 10 and 600 < records < 100_000
    assert decision(tmp_path, 600, 1.2 * epsilon), "what the message names does do"
    assert decision(tmp_path, records + records // 5, 0.2)


def test_two_steps_for_a_test_are_never_refused_for_their_noise(tmp_path):
    assert decision(tmp_path, 600, 0.2, preset="smoke")


@pytest.mark.parametrize(
    ("spelling", "account"),
    [
        ("mnist", "mnist"),
        ("/scans/a.npz", "/scans/a.npz"),
        ("/scans/./b/../a.npz", "/scans/a.npz"),
        ("file:///scans/a.npz", "/scans/a.npz"),
        ("s3://scans/a", "s3://scans/a"),
        ("s3://scans/a/", "s3://scans/a"),
        ("s3a://scans//a", "s3://scans/a"),
        ("local:///scans/a.npz", "/scans/a.npz"),
        ("gcs://scans/a", "gs://scans/a"),
        ("abfss://scans/a", "abfs://scans/a"),
        ("unheard://scans/a/", "unheard://scans/a"),
    ],
)
def test_one_account_for_all_spellings_of_a_place(spelling, account):
    """A second spelling would open a second account, with a budget of its own."""
    if library := {"gcs": "gcsfs", "abfss": "adlfs"}.get(spelling.partition("://")[0]):
        pytest.importorskip(library)
    assert account_name(spelling) == account


@pytest.mark.parametrize("dataset", ["simplecache::file:///scans/a.npz", "zip://a.npz::s3://scans/all.zip"])
def test_a_uri_inside_another_is_refused(dataset):
    """Each way of wrapping it would have an account of its own."""
    with pytest.raises(ConfigError, match=r"dataset='.*' is one URI inside another.*account"):
        account_name(dataset)
