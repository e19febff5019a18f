import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpldm_core.errors import UnsupportedLayerError
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.engine import check_bounded


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 2, bias=False)

    def forward(self, x, y):
        h = torch.tanh(self.conv(x) + self.embed(y)[:, :, None, None])
        return self.out(h.mean((2, 3)))


def conv_loss(model, batch):
    b, k = batch["y"].shape
    return model(batch["x"].flatten(0, 1), batch["y"].flatten()).square().sum(1).reshape(b, k).mean(1)


def frozen(model):
    """A bias and a norm's weight that are not trained."""
    model[0].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    return model


def mlp_loss(model, batch):
    return model(batch["x"]).square().mean(tuple(range(1, batch["x"].ndim)))


def reference(model, loss, batch, max_norm):
    """Batch-of-one autograd, float64: the slow truth."""
    model, total = model.double(), 0
    for i in range(len(batch["x"])):
        one = {k: (v[i : i + 1].double() if v.is_floating_point() else v[i : i + 1]) for k, v in batch.items()}
        trained = [p for p in model.parameters() if p.requires_grad]
        g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model, one).sum(), trained)])
        total = total + g * min(1.0, max_norm / float(g.norm()))
    model.float()
    return total


class Convolutions(nn.Module):
    """Two in a row, clipped from Gram matrices of their pixels where the images are small beside the channels."""

    def __init__(self, kernel=3, stride=1, padding=1, bias=True, channels=40):
        super().__init__()
        self.first = nn.Conv2d(channels, 48, kernel, stride=stride, padding=padding, bias=bias)
        self.second = nn.Conv2d(48, 30, (3, 2), padding=(1, 0))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def image_loss(model, batch):
    b, k = batch["x"].shape[:2]
    return model(batch["x"].flatten(0, 1)).square().sum((1, 2, 3)).reshape(b, k).mean(1)


class UpNet(nn.Module):
    """Norms with weights, and transposed convolutions of every kind that an autoencoder uses."""

    def __init__(self, stride=2, padding=1, output_padding=0, kernel=3):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, kernel, stride=stride, padding=padding, output_padding=output_padding)
        self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)
        for norm in (self.group, self.layer):
            nn.init.normal_(norm.weight, 1.0, 0.3)

    def forward(self, x):
        h = torch.tanh(self.group(self.up(x))).movedim(1, -1)
        return self.out(self.layer(h)).mean((1, 2))


def up_loss(model, batch):
    b, k = batch["x"].shape[:2]
    return model(batch["x"].flatten(0, 1)).square().sum(1).reshape(b, k).mean(1)


CASES = {
    "convolutions": (Convolutions, image_loss, lambda: {"x": torch.randn(6, 1, 40, 4, 5)}),
    "convolutions_of_draws": (Convolutions, image_loss, lambda: {"x": torch.randn(6, 3, 40, 5, 4)}),
    "convolutions_without_bias": (
        lambda: Convolutions(bias=False),
        image_loss,
        lambda: {"x": torch.randn(6, 2, 40, 3, 4)},
    ),
    "convolutions_stride": (
        lambda: Convolutions(stride=(2, 3), padding=(2, 1)),
        image_loss,
        lambda: {"x": torch.randn(6, 2, 40, 5, 7)},
    ),
    "convolutions_wide_padding": (
        lambda: Convolutions(kernel=(2, 3), padding=(3, 4)),
        image_loss,
        lambda: {"x": torch.randn(6, 1, 40, 2, 2)},
    ),
    "convolutions_narrowing": (
        lambda: Convolutions(kernel=4, padding=0),
        image_loss,
        lambda: {"x": torch.randn(6, 1, 40, 7, 6)},
    ),
    "norms_and_transposed": (UpNet, up_loss, lambda: {"x": torch.randn(6, 2, 3, 5, 4)}),
    "transposed_output_padding": (
        lambda: UpNet(output_padding=1),
        up_loss,
        lambda: {"x": torch.randn(6, 1, 3, 4, 5)},
    ),
    "transposed_stride_1": (
        lambda: UpNet(stride=1, padding=0, kernel=2),
        up_loss,
        lambda: {"x": torch.randn(6, 3, 3, 3, 3)},
    ),
    "frozen_parts": (
        lambda: frozen(nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        mlp_loss,
        lambda: {"x": torch.randn(6, 2, 7)},
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)),
        mlp_loss,
        lambda: {"x": torch.randn(6, 7)},
    ),
    "tokens_gram": (
        lambda: nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30)),
        mlp_loss,
        lambda: {"x": torch.randn(6, 3, 40)},
    ),
    "tokens_direct": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        mlp_loss,
        lambda: {"x": torch.randn(6, 30, 4)},
    ),
    "conv_embedding_multiplicity": (
        ConvNet,
        conv_loss,
        lambda: {"x": torch.randn(6, 4, 2, 9, 8), "y": torch.randint(0, 5, (6, 4))},
    ),
}


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("convolutions")])
def test_no_gradient_of_a_unit_is_formed_for_convolutions_of_small_images(case, monkeypatch):
    """The cases above would pass through receptive fields too: they must not, or they tested nothing."""
    monkeypatch.setattr("dpldm_core.privacy.layers._convolution", None)
    make, loss, data = CASES[case]
    model, batch = make(), data()
    sums = BookKeeping(model, max_norm=1.0).clipped_sum(lambda: loss(model, batch), torch.ones(6, dtype=torch.bool))
    assert sums[0].shape == model.first.weight.shape


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_equals_batch_of_one_autograd(case, max_norm):
    torch.manual_seed(1)
    make, loss, data = CASES[case]
    model, batch = make(), data()
    book = BookKeeping(model, max_norm=max_norm)
    got = torch.cat(
        [g.flatten() for g in book.clipped_sum(lambda: loss(model, batch), torch.ones(6, dtype=torch.bool))]
    )
    expected = reference(model, loss, batch, max_norm)
    margin = 3e-4 if case.startswith("convolutions") else 5e-5  # for rows that cancel: it grows with their number
    allowed = margin if max_norm < 1 else 5e-6
    assert float((got.double() - expected).norm() / expected.norm()) < allowed


@pytest.mark.parametrize("case", CASES)
def test_neighbours_differ_by_at_most_the_clip_norm(case):
    torch.manual_seed(2)
    make, loss, data = CASES[case]
    model, batch = make(), {k: v * 30 if v.is_floating_point() else v for k, v in data().items()}
    book = BookKeeping(model, max_norm=0.05)
    masks = [torch.ones(6, dtype=torch.bool), torch.tensor([True] * 5 + [False])]
    a, b = (torch.cat([g.flatten() for g in book.clipped_sum(lambda: loss(model, batch), m)]) for m in masks)
    assert float((a - b).norm()) <= 0.05 * 1.0002
    assert float((a - b).norm()) > 0.05 * 0.99  # the bound is reached: the unit really was clipped, not dropped


def test_a_record_that_is_not_finite_contributes_nothing():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    bad = x.clone()
    bad[2, 1] = float("nan")
    bad[4] = 1e38
    book = BookKeeping(model, max_norm=1.0)
    keep = torch.tensor([True, True, False, True, False])
    expected = book.clipped_sum(lambda: mlp_loss(model, {"x": x}), keep)
    model_sum = book.clipped_sum(
        lambda: (model(bad) * torch.where(bad.abs().amax(1) > 1e30, 1e30, 1.0)[:, None]).square().mean(1),
        torch.ones(5, dtype=torch.bool),
    )
    for a, b in zip(expected, model_sum, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_rows_contribute_nothing():
    model = nn.Linear(3, 2)
    book = BookKeeping(model, max_norm=1.0)
    sums = book.clipped_sum(lambda: mlp_loss(model, {"x": torch.randn(4, 3)}), torch.zeros(4, dtype=torch.bool))
    assert all(float(s.abs().max()) == 0.0 for s in sums)


@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
def test_a_loss_that_would_broadcast_is_refused(shape):
    model = nn.Linear(3, 2)
    book = BookKeeping(model, max_norm=1.0)
    with pytest.raises(UnsupportedLayerError, match="one loss per unit"):
        book.clipped_sum(
            lambda: model(torch.randn(6, 3)).square().mean() * torch.ones(shape), torch.ones(6, dtype=torch.bool)
        )


class MeanCentred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh(h - h.mean(0)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.a(x)), self.a.weight.T)


@pytest.mark.parametrize(
    "model", [MeanCentred(), Tied(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))]
)
def test_what_hooks_cannot_see_is_refused(model):
    with pytest.raises(UnsupportedLayerError):
        check_bounded(model, mlp_loss, {"x": torch.randn(4, 4)})


def test_batch_mean_loss_is_refused():
    with pytest.raises(UnsupportedLayerError, match="mixes units"):
        check_bounded(nn.Linear(4, 2), lambda m, b: (h := m(b["x"])).sum(1) * h.mean(), {"x": torch.randn(4, 4)})


def shared():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, b)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1 is BatchNorm1d.*mixes records"),
        (nn.Sequential(nn.PReLU(), nn.Linear(4, 4)), "0 is PReLU"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=1"),
        (nn.Embedding(3, 4, padding_idx=0), "padding_idx"),
        (shared(), "shares a parameter"),
        (nn.Tanh(), "no trainable parameter"),
    ],
)
def test_layers_that_cannot_be_bounded_are_refused(model, words):
    with pytest.raises(UnsupportedLayerError, match=words):
        BookKeeping(model, max_norm=1.0)


def test_a_layer_that_runs_twice_is_refused():
    layer = nn.Linear(4, 4)
    book = BookKeeping(layer, max_norm=1.0)
    with pytest.raises(UnsupportedLayerError, match="runs twice"):
        book.clipped_sum(lambda: layer(layer(torch.randn(2, 4))).mean(1), torch.ones(2, dtype=torch.bool))


def test_a_layer_that_does_not_run_is_refused():
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
    book = BookKeeping(model, max_norm=1.0)
    with pytest.raises(UnsupportedLayerError, match="did not run"):
        book.clipped_sum(lambda: model[0](torch.randn(2, 4)).mean(1), torch.ones(2, dtype=torch.bool))
