"""What is refused before any budget is spent because the budget would buy nothing."""

import json
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


@pytest.mark.parametrize(("side", "classes", "frequencies"), [(32, 4, 32), (32, 4, 64), (32, 100, 20)])
def test_covariances_of_too_many_numbers_are_refused_with_what_would_do(tmp_path, side, classes, frequencies):
    """Else the mechanism would refuse them when its epsilon is booked."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(300, 20 * classes), side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(len(images)) % classes)

    def opened(frequencies):
        (tmp_path / "c.json").write_text(json.dumps({"autoencoder": {"frequencies": frequencies}}))
        inputs = {"dataset": str(tmp_path / "x.npz"), "epsilon": 10.0, "delta": 1e-5, "preset": "smoke"}
        inputs |= {"num_samples": 0, "latent_mechanism": "dp_sgd", "budget_epsilon": 0.0}
        request = check_request(**inputs, out=str(tmp_path / "r"), config=str(tmp_path / "c.json"))
        return decide(request, data_root=None, cache_dir=None)

    with pytest.raises(ConfigError, match=f"frequencies={frequencies} with {classes} classes") as refused:
        opened(frequencies)
    enough = int(re.search(r"Set (\d+) or less", str(refused.value))[1])
    assert opened(enough), "what the message names does do"
    with pytest.raises(ConfigError, match="frequencies"):
        opened(enough + 1)


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
        ("http://host/x.npz", "http://host/x.npz"),
        ("https://Host:443//x.npz", "http://host/x.npz"),
        ("https://host:8443/x.npz", "http://host:8443/x.npz"),
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


@pytest.mark.parametrize("dataset", ["https://host/x.npz?a=1", "https://me@host/x.npz", "http://host/x.npz#1"])
def test_an_address_with_many_spellings_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"is one of many addresses of its data.*account"):
        account_name(dataset)
