"""Stage 1: noise that the decoder learns to remove, and errors of images as they are shown."""

import numpy as np
import pytest
import torch
from torch import nn

from dpldm_core.data.procedural import procedural_images
from dpldm_core.models.autoencoder import unwhitening, whitening
from dpldm_core.presets import resolve_config
from dpldm_core.training.autoencoder import build_autoencoder, draw_codec, pretrain_autoencoder, reconstruction_loss

SHAPE = (1, 7, 7)


def settings(**values):
    return resolve_config(
        dataset="d",
        epsilon=8.0,
        delta=1e-5,
        preset="quick",
        num_samples=0,
        latent_mechanism="dp_sgd",
        public_num_records=None,
        overrides={"autoencoder": {"frequencies": 7, **values}},
    ).autoencoder


class AsGiven(nn.Module):
    """A codec that encodes nothing and shows what it is told to."""

    def __init__(self, shown):
        super().__init__()
        self.encoder, self.shown = nn.Flatten(), nn.Parameter(shown)

    def decoder(self, latents):
        return self.shown


def test_noise_has_levels_up_to_the_setting_in_whitened_coordinates():
    batch = draw_codec(
        {"values": torch.zeros(4000, 2, 1, 14, 14)},
        np.random.default_rng(0),
        settings(latent_noise=0.3),
        unwhitening(SHAPE),
    )
    white = batch["noise"] @ whitening(SHAPE).T
    assert white.shape == (4000, 2, 49)
    levels = white.std(2)
    assert float(levels.mean()) == pytest.approx(0.15, rel=0.03), "levels are even from 0 to 0.3"
    assert float(levels.min()) < 0.01 and 0.27 < float(levels.quantile(0.99)) < 0.4
    between = torch.corrcoef(torch.stack([levels[:, 0], levels[:, 1]]))[0, 1]
    assert abs(float(between)) < 0.06, "each record has its own level"
    spread = white.std((0, 1))
    torch.testing.assert_close(spread, torch.full_like(spread, 0.3 / 3**0.5), rtol=0.05, atol=0)


def test_without_noise_latents_stay_as_they_are():
    batch = {"values": torch.zeros(3, 1, 1, 14, 14)}
    noise = draw_codec(batch, np.random.default_rng(0), settings(latent_noise=0.0), unwhitening(SHAPE))["noise"]
    assert torch.equal(noise, torch.zeros(3, 1, 49))


def test_what_lies_beyond_black_or_white_is_no_error():
    images = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 0.5, -0.5, -0.99])
    shown = torch.tensor([-1.7, -0.8, 1.3, 1.2, -1.4, 1.5, -1.5, -1.49])
    expected = torch.tensor([0.0, 0.2, 2.3, 0.0, 2.4, 1.0, 1.0, 0.5]).square()
    model = AsGiven(shown.view(1, 1, 2, 4))
    batch = {
        "values": images.view(1, 1, 1, 2, 4),
        "weights": torch.ones(1, 1),
        "noise": torch.zeros(1, 1, 8),
    }
    loss = reconstruction_loss(model, batch)
    torch.testing.assert_close(loss, expected.mean()[None])
    loss.sum().backward()
    moved = model.shown.grad.flatten() != 0
    assert moved.tolist() == [False, True, True, False, True, True, True, True]


def test_the_noise_reaches_the_decoder():
    model = build_autoencoder(settings(), channels=1, height=14, width=14)
    values = procedural_images(8, 1, 14, 14, generator=torch.Generator().manual_seed(0))[:, None]
    batch = {"values": values, "weights": torch.ones(8, 1), "noise": torch.zeros(8, 1, 49)}
    clean = reconstruction_loss(model, batch)
    noisy = reconstruction_loss(
        model, batch | {"noise": 0.5 * torch.randn(8, 1, 49, generator=torch.Generator().manual_seed(1))}
    )
    assert bool((noisy > clean).all())


def test_a_decoder_that_has_met_noise_removes_more_of_it():
    errors = {}
    images = procedural_images(1000, 1, 14, 14, generator=torch.Generator().manual_seed(9))
    noise = 0.4 * torch.randn(len(images), 49, generator=torch.Generator().manual_seed(1)) @ unwhitening(SHAPE).T
    for level in (0.0, 0.5):
        config = settings(latent_noise=level, procedural_steps=150, procedural_batch_size=64)
        model = build_autoencoder(config, channels=1, height=14, width=14)
        pretrain_autoencoder(model, config, seed=0)
        with torch.no_grad():
            shown = model.decoder(model.encoder(images) + noise).clamp(-1, 1)
        errors[level] = float((shown - images).square().mean())
    assert errors[0.5] < 0.9 * errors[0.0], errors


def test_pretraining_in_bfloat16_ends_before_private_records_are_met(monkeypatch):
    """DP-SGD bounds norms and sums in the precision that it was told; the decoder may not work in another."""
    config, met = settings(procedural_steps=2, procedural_batch_size=8), []
    model = build_autoencoder(config, channels=1, height=14, width=14)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.decoder.refiner.layers[0].register_forward_hook(lambda *_: met.append(torch.is_autocast_enabled("cpu")))
    pretrain_autoencoder(model, config, seed=0)
    model(torch.zeros(3, 1, 14, 14))
    assert met == [True, True, False]
