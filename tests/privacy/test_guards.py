"""Guards of the clip, one at a time: rounding where a unit's rows cancel, buffers, batch statistics, stacked parts."""

import pytest
import torch
from torch import nn

from dpldm_core.errors import UnsupportedLayerError
from dpldm_core.privacy.class_statistics import CLASS_MEANS
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.engine import check_bounded
from dpldm_core.privacy.layers import ROUNDING, Fields, Outer
from dpldm_core.privacy.one_shot import MEAN, SECOND, moment_contributions
from dpldm_core.privacy.opacus_backend import OpacusClipping


def cancelling(seed):
    """One unit whose rows cancel but for a part in a million, far below what float32 keeps of them."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, 6, 40, generator=g), torch.randn(1, 6, 50, generator=g)
    rest = 1 + 1e-6 * torch.randn(b.shape, generator=g)
    return Outer(torch.cat([a, a], 1), torch.cat([b, -b * rest], 1), nn.Parameter(torch.zeros(50, 40)), None)


def cancelling_images(seed):
    """The same for two images and a convolution."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, 20, 3, 2, generator=g), torch.randn(1, 30, 3, 2, generator=g)
    rest = 1 + 1e-6 * torch.randn(b.shape, generator=g)
    layer = nn.Conv2d(20, 30, 3, padding=1, bias=False)
    return Fields(layer, torch.cat([a, a]), torch.cat([b, -b * rest]), 1)


def clipped_norms(make, max_norm=1e-6):
    """Norms of clipped units over the clip norm, for 200 units."""
    found = []
    for seed in range(200):
        part = make(seed)
        factors = (max_norm / part.squared_norms(0.0).sqrt()).clamp(max=1.0)
        [(_, total)] = part.weighted_sums(factors)
        found.append(float(total.double().norm()) / max_norm)
    return found


@pytest.mark.parametrize("make", [cancelling, cancelling_images])
def test_no_unit_whose_rows_cancel_exceeds_the_clip(make):
    """Gram matrices in float32 see nothing of what is left; the margin for rounding must cover what the sum sees."""
    assert max(clipped_norms(make)) <= 1.0


@pytest.mark.parametrize("make", [cancelling, cancelling_images])
def test_without_the_margin_rows_that_cancel_exceed_the_clip(make, monkeypatch):
    """The negative control."""
    assert ROUNDING > 0
    monkeypatch.setattr("dpldm_core.privacy.layers.ROUNDING", 0.0)
    assert max(clipped_norms(make)) > 1.1


class Remembering(nn.Module):
    """Keeps a statistic of its inputs, as norms with running means do, without using it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        self.seen += x.detach().mean(0)
        return self.linear(x)


def test_a_buffer_that_a_forward_pass_changes_is_refused():
    """It would hold private values without noise, and be saved with the model."""
    with pytest.raises(UnsupportedLayerError, match=r"changes the buffers \['seen'\]"):
        check_bounded(Remembering(), lambda m, b: m(b["x"]).square().mean(1), {"x": torch.randn(4, 4)})


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4).requires_grad_(False)])
def test_batch_norm_without_weights_is_refused_by_name(norm):
    """It has nothing to train, so no hook looks at it, and in evaluation mode it mixes no records: not yet."""
    with pytest.raises(UnsupportedLayerError, match="1 is BatchNorm1d: it mixes records"):
        BookKeeping(nn.Sequential(nn.Linear(4, 4), norm.eval()), max_norm=1.0)


@pytest.mark.filterwarnings("ignore")  # opacus and torch warn of hooks
def test_opacus_refuses_a_loss_that_would_broadcast():
    """Of shape [B, 1], with gradients as they should be: only the shape tells."""
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    clip, mask = OpacusClipping(model, max_norm=1.0), torch.ones(6, dtype=torch.bool)
    assert all(bool(torch.isfinite(s).all()) for s in clip.clipped_sum(lambda: model(x).square().sum(1), mask))
    with pytest.raises(UnsupportedLayerError, match=r"shape \(6, 1\)"):
        clip.clipped_sum(lambda: model(x).square().sum(1, keepdim=True), mask)


@pytest.mark.parametrize("split", [CLASS_MEANS, MEAN, SECOND], ids=["class_means", "mean", "second"])
def test_the_parts_of_one_record_have_norm_one_together(split):
    """Count, vector and outer product of a record at or beyond the clip norm: their sensitivity is met, not passed."""
    for vector in ([0.0, 3.0, 0.0], [1.0, -2.0, 2.0], [50.0, 80.0, -1e6]):
        parts = moment_contributions(torch.tensor([vector]), torch.ones(1), clip_norm=3.0, split=split)
        assert float(parts.norm()) == pytest.approx(1.0, abs=1e-7)
