"""Stage 2 before it meets private data, and the prior that it starts from."""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpldm_core.data.schema import ImageSchema, Records, write_records
from dpldm_core.models.autoencoder import whitening
from dpldm_core.models.prior import GaussianPrior
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.class_statistics import ClassCovariances, noisy_class_covariances, noisy_class_means
from dpldm_core.privacy.plan import DpSgdPlan, GaussianRecordPlan, GaussianSumPlan, ReleasePlan
from dpldm_core.rng import SecretKey
from dpldm_core.training import stages
from dpldm_core.training.autoencoder import build_autoencoder
from dpldm_core.training.building import new_autoencoder, new_denoiser, to_tensor, to_uint8
from dpldm_core.training.diffusion import build_denoiser, pretrain_denoiser
from dpldm_core.training.prior import fit_prior, release_prior
from dpldm_core.training.sampling import sample_images
from dpldm_core.training.state import save_model
from dpldm_core.training.units import Units


def settings(frequencies=6, **diffusion):
    overrides = {"autoencoder": {"frequencies": frequencies}, "diffusion": {"width": 16, "depth": 2, **diffusion}}
    return resolve_config(
        dataset="d",
        epsilon=8.0,
        delta=1e-5,
        preset="smoke",
        num_samples=0,
        latent_mechanism="dp_sgd",
        public_num_records=None,
        overrides=overrides,
    )


def models(config, channels=1, size=12):
    autoencoder = build_autoencoder(config.autoencoder, channels=channels, height=size, width=size)
    shape = autoencoder.encoder.transform.latent_shape
    return autoencoder.encoder, build_denoiser(config.diffusion, latent_shape=shape, num_classes=3)


def test_procedural_images_teach_the_denoiser_before_any_private_one():
    config = settings(14, procedural_steps=160, procedural_batch_size=64, width=32, P_mean=-1.5, P_std=0.5)
    encoder, model = models(config, size=28)
    before = {name: value.clone() for name, value in model.prior.state_dict().items()}
    curve = pretrain_denoiser(model, encoder, config.diffusion, seed=0)
    assert len(curve) == 160 and sum(curve[-30:]) < 0.93 * sum(curve[:30])
    assert all(torch.equal(value, before[name]) for name, value in model.prior.state_dict().items())


def test_pretraining_in_bfloat16_ends_before_private_records_are_met(monkeypatch):
    """DP-SGD bounds norms and sums in the precision that it was told; the network may not work in another."""
    config = settings(procedural_steps=2)
    (encoder, model), met = models(config), []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.network.inner.register_forward_hook(lambda *_: met.append(torch.is_autocast_enabled("cpu")))
    pretrain_denoiser(model, encoder, config.diffusion, seed=0)
    model(torch.zeros(3, model.dim), torch.ones(3), torch.zeros(3, dtype=torch.int64))
    assert met == [True, True, False]


def test_equal_seeds_pretrain_equal_networks_and_no_steps_change_nothing():
    config = settings(procedural_steps=3)
    weights = []
    for seed in (1, 1, 2):
        encoder, model = models(config)
        pretrain_denoiser(model, encoder, config.diffusion, seed=seed)
        weights.append(torch.cat([p.detach().flatten() for p in model.network.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    encoder, model = models(settings(procedural_steps=0))
    assert pretrain_denoiser(model, encoder, settings(procedural_steps=0).diffusion, seed=1) == []


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 5, 3)])
def test_odd_sizes_are_padded_and_cut_and_no_class_is_no_error(shape):
    model = build_denoiser(settings().diffusion, latent_shape=shape, num_classes=2)
    torch.nn.init.normal_(model.network.outer.weight)
    dim = math.prod(shape)
    x, sigma = torch.randn(3, dim), torch.ones(3)
    assert model(x, sigma, torch.tensor([0, 1, 1])).shape == (3, dim)
    estimate, nameless = torch.zeros(3, dim), torch.full((3,), -1)
    found = model.refine(x, sigma, estimate, nameless)
    assert bool((found != 0).all()), "every pixel of the latent is corrected"
    assert not torch.equal(found, model.refine(x, sigma, estimate, torch.zeros_like(nameless)))


def prior_plans(sigma):
    """Of means and covariances, both with this noise."""
    stages = ("latent_means", "latent_covariances")
    return tuple(GaussianSumPlan(stage=stage, max_norm=1.0, noise_multiplier=sigma) for stage in stages)


def key_of(stage):
    return SecretKey(bytes(32)).derive(stage)


def test_the_released_prior_is_that_of_the_latents():
    """Measured in whitened coordinates with next to no noise, then mapped back: the latents' own moments."""
    config, n, shape = settings(), 6000, (1, 4, 4)
    generator, white = torch.Generator().manual_seed(0), whitening(shape)
    coordinates = 0.3 * torch.randn(n, 16, generator=generator)
    labels = torch.arange(n) % 2
    coordinates[labels == 1, 3] += 0.5
    latents = coordinates @ torch.linalg.inv(white).T
    prior = GaussianPrior(2, 16)
    units = Units(latents, labels, torch.arange(n)[:, None])
    settings_of_prior = config.prior.model_copy(update={"clip_norm": 5.0, "class_weight": 1.0, "variance_floor": 1e-3})
    settings_of_prior = settings_of_prior.model_copy(update={"covariance_clip_norm": 5.0})
    release_prior(prior, units, prior_plans(1e-6), key_of, settings_of_prior, white)
    for label in range(2):
        own = latents[labels == label]
        torch.testing.assert_close(prior.means[label], own.mean(0), atol=5e-3, rtol=0)
        found = prior.bases[label] @ torch.diag(prior.variances[label]) @ prior.bases[label].T
        torch.testing.assert_close(found, torch.cov(own.T), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("sigma", "expected"), [(1e-9, [0.0625, 0.9375]), (1e-2, None)])
def test_the_shares_of_the_classes_are_those_of_the_noisy_counts(sigma, expected):
    """They come from what was released; a count below its noise stands for that noise."""
    released, settings_of_prior = [], settings().prior

    def kept(*arguments, **options):
        released.append(noisy_class_means(*arguments, **options))
        return released[-1]

    labels = (torch.arange(64) % 16 > 0).long()
    units = Units(0.1 * torch.randn(64, 16), labels, torch.arange(64)[:, None])
    prior, white = GaussianPrior(2, 16), whitening((1, 4, 4))
    with mock.patch("dpldm_core.training.prior.noisy_class_means", kept):
        release_prior(prior, units, prior_plans(sigma), key_of, settings_of_prior, white)
    counts = released[0].counts.numpy()
    np.testing.assert_allclose(prior.shares, counts / counts.sum(), rtol=1e-5)
    if expected:
        np.testing.assert_allclose(prior.shares, expected, rtol=1e-5)
    else:
        assert not np.allclose(counts, counts.round())
    few = dataclasses.replace(released[0], counts=torch.tensor([-3.0, 40.0]), count_std=10.0)
    fit_prior(prior, few, ClassCovariances(torch.eye(16).double().repeat(2, 1, 1), 0.1), settings_of_prior)
    np.testing.assert_allclose(prior.shares, [0.2, 0.8], rtol=1e-6)


def seen_by_the_mechanisms(tmp_path, monkeypatch, latents):
    """What the prior's mechanism and the first DP-SGD step are given when the stage runs on some private latents."""
    schema = ImageSchema(height=8, width=8, channels=1, class_names=("a", "b"), labelled=True, grouped=False)
    n, seen = len(latents), {}
    table = {"latents": latents, "labels": torch.arange(n) % 2, "table": torch.arange(n)[:, None]}
    save_file(table, tmp_path / "latents.safetensors")
    dp_sgd = DpSgdPlan(
        stage="train_diffusion",
        sample_rate=0.5,
        num_steps=2,
        max_grad_norm=0.1,
        noise_multiplier=1.0,
        truncation_probability=1e-12,
        max_batch_size=24,
    )
    release = ReleasePlan(
        mechanisms=(*prior_plans(1.0), dp_sgd), delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one record"
    )

    def spying(mechanism):
        def spy(plan, key, vectors, *rest, **options):
            seen[plan.stage] = vectors
            if mechanism is noisy_class_covariances:
                assert rest[-1] is seen["released"]  # about the noisy means, and nothing else
            seen["released"] = mechanism(plan, key, vectors, *rest, **options)
            return seen["released"]

        return spy

    def no_training(model, units, *rest, **loop):
        seen["network"] = torch.cat([p.detach().flatten() for p in model.network.parameters()])
        return model

    monkeypatch.setattr(stages, "settle_on_cpu", lambda: 1)  # the clock's choice would change the last bits
    for mechanism in (noisy_class_means, noisy_class_covariances):
        monkeypatch.setattr(f"dpldm_core.training.prior.{mechanism.__name__}", spying(mechanism))
    monkeypatch.setattr(stages, "train_denoiser", no_training)
    config, key = settings(4), SecretKey(bytes(32))
    stages.train_diffusion(
        tmp_path / "latents.safetensors", 0.0, config, schema, release, lambda stage: key, stages.Run(tmp_path)
    )
    return seen


def test_no_latent_reaches_a_mechanism_through_another_or_the_network_before_its_noise(tmp_path, monkeypatch):
    """Scales or a basis read from the data, and ordinary training on it, would show in what neighbours share."""
    latents = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    before = seen_by_the_mechanisms(tmp_path, monkeypatch, latents)
    other = latents.clone()
    other[19] = 100.0
    after = seen_by_the_mechanisms(tmp_path, monkeypatch, other)
    for stage in ("latent_means", "latent_covariances"):
        assert torch.equal(before[stage][:19], after[stage][:19])
        assert not torch.equal(before[stage][19], after[stage][19])
    assert torch.equal(before["network"], after["network"])


def test_released_latents_are_whitened_and_sampling_leads_back_to_images(tmp_path):
    """Mode noised_latents, with next to no noise: a prior that holds one released latent draws that latent's image."""
    schema = ImageSchema(height=8, width=8, channels=1, class_names=("",), labelled=False, grouped=False)
    config = resolve_config(
        dataset="d",
        epsilon=8.0,
        delta=1e-5,
        preset="smoke",
        num_samples=4,
        latent_mechanism="noised_latents",
        public_num_records=None,
    )
    ramp = np.linspace(40, 200, 8).astype(np.uint8)
    images = np.broadcast_to(ramp[None, :, None, None], (6, 8, 8, 1)).copy()
    write_records(tmp_path / "train", Records(images, np.zeros(6, np.int64), None, schema))
    codec = new_autoencoder(config, schema)
    paths = tmp_path / "autoencoder.safetensors", tmp_path / "decoder.safetensors", tmp_path / "denoiser.safetensors"
    save_model(codec, paths[0])
    save_model(codec.decoder, paths[1])
    records = GaussianRecordPlan(stage="extract_latents", max_norm=100.0, noise_multiplier=1e-7)
    release = ReleasePlan(mechanisms=(records,), delta=1e-5, relation="REPLACE_ONE", unit_of_privacy="one record")
    run, key = stages.Run(tmp_path), SecretKey(bytes(32))
    released, noise_std = stages.extract_latents(tmp_path / "train", paths[0], config, release, lambda stage: key, run)
    latents = load_file(released)["latents"]
    expected = codec.encoder(to_tensor(images)) @ whitening(codec.encoder.transform.latent_shape).T
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)
    model = new_denoiser(config, schema, noise_std)
    model.prior.means.copy_(latents[:1])
    model.prior.variances.fill_(1e-8)
    save_model(model, paths[2])
    drawn, _ = sample_images(paths[1], paths[2], config, schema, range(4), noise_std=noise_std)
    restored = to_uint8(codec(to_tensor(images)).detach())
    assert np.abs(drawn.astype(int) - restored[:4].astype(int)).max() <= 2
