import pytest
import torch

from dpldm_core.data.procedural import procedural_images


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 20), (1, 64, 64)])
def test_images_are_in_range_varied_and_reproducible(shape):
    images = procedural_images(300, *shape, generator=torch.Generator().manual_seed(0))
    assert images.shape == (300, *shape) and images.dtype == torch.float32
    assert float(images.min()) >= -1 and float(images.max()) <= 1 and bool(images.isfinite().all())
    assert float(images.flatten(1).std(1).median()) > 0.1, "most are not blank"
    again = procedural_images(300, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    assert len({image.numpy().tobytes() for image in images}) == 300
