import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from pytorch_fid import inception

from dpldm_core.errors import ConfigError
from dpldm_core.evaluation import features
from dpldm_core.evaluation.downstream import SmallCnn


@pytest.fixture(scope="module")
def published():
    """pytorch-fid's own network with random weights in place of the downloaded ones."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
        torch.manual_seed(0)
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda self, state: None)
        net = inception.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 3, generator=generator)
            module.bias.data.normal_(generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.1, 1, generator=generator)
    return net.eval()


@pytest.mark.parametrize(("num_features", "partial"), [(768, True), (2048, False)])
def test_inception_computes_what_pytorch_fid_computes(published, monkeypatch, num_features, partial):
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: published)
    reference = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[num_features]]).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    images[1] //= 8
    weights = {name: value for name, value in published.state_dict().items() if not name.endswith("batches_tracked")}
    if partial:
        weights = {name: value for name, value in weights.items() if not name.startswith(("fc", "Mixed_7"))}
    network = features.inception_network(weights, partial=partial)
    found = features.FeatureExtractor("fid", network)(images)
    with torch.inference_mode():
        raw = reference(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)[0]
    expected = torch.nn.functional.adaptive_avg_pool2d(raw, 1).flatten(1).numpy()
    assert found.shape == (2, num_features)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found[0] - found[1]).max() > 1e-2 * np.abs(expected).max()  # random weights do tell images apart


def test_gray_is_repeated_to_three_channels(published):
    network = features.inception_network(published.state_dict(), partial=True)
    gray = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    extractor = features.FeatureExtractor("fd_inception768", network)
    np.testing.assert_allclose(extractor(gray), extractor(gray.repeat(3, axis=3)), rtol=1e-3, atol=1e-5)


def test_a_missing_or_unknown_file_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "inception.pth"
    with pytest.raises(ConfigError, match=r"DPLDM_INCEPTION_WEIGHTS=.*inception\.pth.*No such file.*6726825d.*unset"):
        features.inception_extractor(path)
    path.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ConfigError, match=rf"DPLDM_INCEPTION_WEIGHTS=.*{digest}.*6726825d.*unset"):
        features.inception_metric(path)


@pytest.mark.parametrize(("metric", "partial"), [("fid", False), ("fd_inception768", True)])
def test_the_digest_decides_the_name_and_the_layers(tmp_path, monkeypatch, metric, partial):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.ones(1)}, path)
    monkeypatch.setattr(features, "_METRICS", {hashlib.sha256(path.read_bytes()).hexdigest(): metric})
    asked = []
    monkeypatch.setattr(
        features,
        "inception_network",
        lambda weights, partial: asked.append((list(weights), partial)) or torch.nn.Identity(),
    )
    assert features.inception_extractor(path).metric == metric
    assert asked == [(["x"], partial)]


class Payload:
    def __reduce__(self):
        return (print, ("run by the file",))


def test_a_weights_file_cannot_run_code(tmp_path, monkeypatch, capsys):
    path = tmp_path / "weights.pth"
    torch.save(Payload(), path)
    monkeypatch.setattr(features, "_METRICS", {hashlib.sha256(path.read_bytes()).hexdigest(): "fid"})
    with pytest.raises(pickle.UnpicklingError):
        features.inception_extractor(path)
    assert capsys.readouterr().out == ""


def test_the_fallback_is_the_last_hidden_layer_and_is_not_called_fid():
    classifier = SmallCnn((12, 12, 3), 5).eval()
    images = np.random.default_rng(0).integers(0, 256, (70, 12, 12, 3), dtype=np.uint8)
    extractor = features.classifier_extractor(classifier)
    found = extractor(images)
    assert extractor.metric == "fd_real_classifier"
    assert found.shape == (70, 128)
    assert found.dtype == np.float32
    with torch.inference_mode():
        logits = classifier(torch.from_numpy(images).permute(0, 3, 1, 2))
        torch.testing.assert_close(classifier.head(torch.from_numpy(found)), logits)
