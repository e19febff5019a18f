import pytest
import torch

from dpldm_core.models.autoencoder import LATENT_BOUND, Autoencoder, FrequencyTransform, unwhitening, whitening
from dpldm_core.privacy.clipping import BookKeeping

FORMATS = [(1, 28, 28), (3, 32, 32), (1, 9, 14), (3, 64, 48)]


def make(channels=1, height=28, width=28, frequencies=64):
    return Autoencoder(channels=channels, height=height, width=width, frequencies=frequencies, refiner_channels=4)


@pytest.mark.parametrize("shape", FORMATS)
def test_the_transform_is_orthonormal_when_nothing_is_cut(shape):
    """All frequencies kept: shrinking changes no size, enlarging is the identity, and energy is that of the pixels."""
    transform = FrequencyTransform(*shape, 64)
    images = torch.rand(5, *shape) * 2 - 1
    small = transform.shrink(images)
    assert small.shape == images.shape and transform.dim == images[0].numel()
    torch.testing.assert_close(transform.enlarge(small), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(small.square().sum((1, 2, 3)), images.square().sum((1, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", FORMATS)
def test_a_small_image_keeps_the_brightness_of_the_large_one(shape):
    small = FrequencyTransform(*shape, 6).shrink(torch.full((1, *shape), 0.5))
    assert small.shape == (1, shape[0], 6, 6)
    expected = torch.full((6, 6), 0.5 * (1 if shape[0] == 1 else 3**0.5))  # luminance of gray, orthonormal
    torch.testing.assert_close(small[0, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 14, 14), (3, 9, 6)])
def test_whitened_coordinates_have_the_variance_of_the_law(shape):
    """Images whose cosine amplitudes follow 0.35 sqrt(h w) / (1 + radius) become white; the map has an inverse."""
    height, width = shape[1:]
    white, back = whitening(shape).double(), unwhitening(shape).double()
    torch.testing.assert_close(white @ back, torch.eye(len(white)).double(), rtol=0, atol=1e-4)
    flat = torch.full(shape, 1.0).flatten().double()
    assert float((white @ flat)[0]) == pytest.approx(1 / 0.35, rel=1e-4), "the mean is the first cosine"
    norms = back.norm(dim=0).view(shape)  # of the image that one coordinate stands for: cosines are orthonormal
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    expected = 0.35 * (height * width) ** 0.5 / (1 + torch.hypot(y.double(), x.double()))
    torch.testing.assert_close(norms, expected.expand(shape).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", FORMATS)
def test_cut_frequencies_give_the_closest_image_of_that_dimension(shape):
    """Projection: encoding what was decoded changes nothing."""
    transform = FrequencyTransform(*shape, 6)
    once = transform.enlarge(transform.shrink(torch.rand(4, *shape)))
    torch.testing.assert_close(transform.enlarge(transform.shrink(once)), once, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", FORMATS)
def test_untrained_codec_restores_images_of_low_frequencies(shape):
    model = make(*shape, frequencies=5)
    y, x = torch.meshgrid(torch.linspace(0, 3, shape[1]), torch.linspace(0, 3, shape[2]), indexing="ij")
    images = (0.5 * torch.sin(x + y)).expand(2, *shape)
    restored = model(images).detach()
    assert restored.shape == images.shape and float((restored - images).abs().mean()) < 0.05


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e6])
def test_latents_are_bounded_whatever_the_data(value):
    """The scale is a constant, never read from the data."""
    latents = make().encoder(torch.full((1, 1, 28, 28), value))
    assert float(latents.abs().max()) <= LATENT_BOUND  # NaN is not


def test_a_latent_depends_on_its_own_image_alone():
    model, images = make(), torch.rand(6, 1, 28, 28)
    together = model.encoder(images)
    for i in range(6):
        torch.testing.assert_close(model.encoder(images[i : i + 1])[0], together[i], atol=1e-6, rtol=0)


def test_the_encoder_has_no_weights_and_the_decoder_can_be_bounded():
    model = make()
    assert not list(model.encoder.parameters())
    assert BookKeeping(model, max_norm=1.0).num_parameters == sum(p.numel() for p in model.decoder.parameters())


def test_tensors_of_the_transform_are_not_saved():
    """They follow from public sizes; the decoder's file holds weights alone."""
    assert all(name.startswith("refiner.") for name in make().decoder.state_dict())
