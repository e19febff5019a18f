"""Stages as functions from files to files, and the sampler's independence of how it is called."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.data.schema import write_records
from dpldm_core.errors import CheckpointError
from dpldm_core.models.classifier import train_classifier
from dpldm_core.models.teacher import PriorTeacher
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.calibration import plan_release
from dpldm_core.rng import SecretKey
from dpldm_core.training import building, sampling, stages
from dpldm_core.training.autoencoder import encode
from dpldm_core.training.state import load_model
from tests.tasks.conftest import drawings

PRIOR = ("latent_means", "latent_covariances")
KEYS = {
    name: SecretKey.generate()
    for name in ("train_autoencoder", *PRIOR, "train_diffusion", "train_first_teacher", "train_teacher")
}


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """The clock's choice of a number of threads would change the last bits, and some tests compare all of them."""
    for module in (stages, sampling):
        monkeypatch.setattr(module, "settle_on_cpu", lambda: 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    images, labels = drawings(360)
    np.savez(folder / "x.npz", images=images, labels=labels)
    train, _ = ingest_dataset(
        str(folder / "x.npz"),
        folder,
        split_key=b"k",
        data_root=None,
        cache_dir=None,
        num_classes=None,
        relation="ADD_OR_REMOVE_ONE",
    )
    config = resolve_config(
        dataset="x",
        epsilon=8.0,
        delta=1e-5,
        preset="smoke",
        num_samples=60,
        latent_mechanism="dp_sgd",
        public_num_records=None,
    )
    schema = stages.read_records(train).schema
    plan = plan_release(config, num_classes=3, latent_dim=16, grouped=False)
    run = stages.Run(folder)
    autoencoder, decoder, curve = stages.train_codec(train, config, plan, KEYS.__getitem__, run)
    latents, noise_std = stages.extract_latents(train, autoencoder, config, plan, KEYS.__getitem__, run)
    denoiser, denoiser_curve = stages.train_diffusion(latents, noise_std, config, schema, plan, KEYS.__getitem__, run)
    teacher = stages.train_teacher(train, autoencoder, decoder, denoiser, config, plan, KEYS.__getitem__, run)
    assert len(curve) == len(denoiser_curve) == 3, "the curves of procedural images alone, not those of private steps"
    return {
        "config": config,
        "schema": schema,
        "decoder": decoder,
        "denoiser": denoiser,
        "teacher": teacher,
        "folder": folder,
        "train": train,
    }


def draw(trained, indices, **options):
    config = options.pop("config", trained["config"])
    return sampling.sample_images(
        trained["decoder"], trained["denoiser"], config, trained["schema"], indices, **options
    )


def with_teacher(config, **values):
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=values)})


def sampled(config, **values):
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=values)})


@pytest.mark.parametrize("guidance", [0.0, 6.0])
def test_images_do_not_depend_on_batch_size_or_shard(trained, guidance):
    trained = trained | {"config": sampled(trained["config"], guidance=guidance, sharpness=guidance / 10)}
    whole, labels = draw(trained, range(60))
    for batch_size in (1, 7, 60):
        again, same_labels = draw(trained, range(60), batch_size=batch_size)
        difference = np.abs(again.astype(int) - whole.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, "float rounding alone"
        assert np.array_equal(labels, same_labels)
    shards = [draw(trained, sampling.shard_indices(60, s, 4))[0] for s in range(4)]
    assert np.abs(np.concatenate(shards).astype(int) - whole.astype(int)).max() <= 1


def test_guidance_moves_each_image_by_a_strength_of_its_own(trained):
    """Half of the images are plain; the strengths of the others are uniform around the setting."""
    seen = []
    with mock.patch.object(sampling, "guide", lambda model, prior, strengths, **_: seen.append(strengths) or model):
        draw(trained, range(600), config=sampled(trained["config"], guidance=6.0))
    strengths = torch.cat(seen)
    assert strengths.shape == (600,) and float(strengths.max()) <= 9
    assert abs(float((strengths == 0).double().mean()) - 1 / 2) < 5 * (1 / 4 / 600) ** 0.5
    assert not bool(((strengths > 0) & (strengths < 3)).any())
    for low in range(3, 9):
        share = float(((strengths >= low) & (strengths < low + 1)).double().mean())
        assert abs(share - 1 / 12) < 5 * (1 / 12 * 11 / 12 / 600) ** 0.5
    plain, clear = (draw(trained, range(60), config=sampled(trained["config"], guidance=s))[0] for s in (0.0, 6.0))
    assert not np.array_equal(plain, clear)


@pytest.mark.parametrize(
    "values",
    [{"sharpness": 0.8, "sharpened_below": 1.0}, {"S_noise": 1.5}, {"sharpness": 0.8, "sharpened_below": 1e-3}],
)
def test_sharpness_and_fresh_noise_reach_the_images(trained, values):
    plain = draw(trained, range(60), config=sampled(trained["config"], sharpness=0.0))[0]
    changed = draw(trained, range(60), config=sampled(trained["config"], **values))[0]
    assert np.array_equal(plain, changed) == (values.get("sharpened_below", 1.0) < trained["config"].sampling.sigma_min)


def test_sampling_from_a_fixed_model_with_a_fixed_seed_is_reproducible(trained):
    first = draw(trained, range(20))[0]
    assert np.array_equal(draw(trained, range(20))[0], first)
    other = draw(trained, range(20), config=trained["config"].model_copy(update={"seed": 1}))[0]
    assert not np.array_equal(other, first)


def test_bfloat16_moves_images_by_its_rounding_and_is_used_where_the_processor_has_it(trained, monkeypatch):
    """Networks whose correction is as large as a trained one's, drawn in both precisions."""
    wide = trained | {name: trained["folder"] / f"wide-{name}" for name in ("decoder", "denoiser")}
    generator = torch.Generator().manual_seed(0)
    for name, layer in (("decoder", "refiner.layers.4.weight"), ("denoiser", "network.outer.weight")):
        tensors = load_file(trained[name])
        tensors[layer] = 0.1 * torch.randn(tensors[layer].shape, generator=generator)
        save_file(tensors, wide[name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU is left as it is
    drawn = {}
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        drawn[native] = draw(wide, range(60))[0].astype(int)
    difference = np.abs(drawn[True] - drawn[False])
    assert 0 < difference.mean() < 1.0 and np.quantile(difference, 0.99) <= 8, "gray levels"


def test_images_do_not_depend_on_the_number_of_threads(trained):
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            drawn.append(draw(trained, range(60), batch_size=20)[0])
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*drawn)


def test_labels_are_uniform_whatever_the_private_proportions(trained):
    assert np.bincount(draw(trained, range(60))[1]).tolist() == [20, 20, 20]


def test_a_teacher_names_the_classes_and_leaves_the_images_alone(trained, tmp_path):
    plain, drawn_for = draw(trained, range(60))
    weights = load_file(trained["teacher"])
    for turns in range(2):  # one that may agree with every class drawn for, one that then agrees with none
        teacher = tmp_path / f"{turns}.safetensors"
        save_file(weights | {"head.weight": weights["head.weight"].roll(turns, 0)}, teacher)
        images, named = draw(trained, range(60), teacher=teacher)
        assert np.array_equal(images, plain)
        judge = building.new_teacher(trained["config"], trained["schema"])
        load_model(judge, teacher)
        assert np.array_equal(named, judge.classify(plain, load_file(trained["denoiser"])["prior.shares"]))
    assert not np.array_equal(named, drawn_for)


def test_the_released_shares_of_the_classes_correct_the_names_alone(trained, tmp_path):
    plain, named = draw(trained, range(60), teacher=trained["teacher"])
    weights = load_file(trained["denoiser"])
    for label in range(3):  # a class that private records hardly ever showed, if these were their shares
        shares = torch.full((3,), 0.5).index_fill(0, torch.tensor([label]), 1e-30)
        save_file(weights | {"prior.shares": shares}, tmp_path / "denoiser.safetensors")
        options = {"denoiser": tmp_path / "denoiser.safetensors"}
        images, corrected = draw(trained | options, range(60), teacher=trained["teacher"])
        assert np.array_equal(images, plain) and (corrected == label).all()
    assert not (named == named[0]).all()


def test_the_teacher_learns_its_features_from_other_samples_than_are_published(trained):
    config = trained["config"]
    others = range(config.num_samples, config.num_samples + config.teacher.num_synthetic)
    images, labels = draw(trained, others)
    network = train_classifier(images, labels, num_classes=3, num_epochs=1, seed=config.seed)
    stored = load_file(trained["teacher"])
    for name, value in network.state_dict().items():
        assert torch.allclose(stored[f"network.{name}"].float(), value.float(), atol=1e-4), name


def test_samples_of_the_prior_alone_teach_where_no_private_record_does(trained, tmp_path):
    values = trained["config"].model_dump()
    values["teacher"]["dp_sgd"]["budget_share"] = 0.0
    config = type(trained["config"]).model_validate(values)
    schema, files = trained["schema"], (trained["decoder"], trained["denoiser"])
    assert config.named_by_prior(schema.num_classes)
    for other in (trained["config"], with_teacher(config, from_prior=False)):
        assert not other.named_by_prior(schema.num_classes)
    assert not config.model_copy(update={"latent_mechanism": "noised_latents"}).named_by_prior(schema.num_classes)
    assert not config.named_by_prior(1)

    with mock.patch.object(stages, "read_records", side_effect=AssertionError("no private record is read")):
        teacher = stages.teach_from_prior(*files, config, schema, stages.Run(tmp_path))
    others = range(config.num_samples, config.num_samples + config.teacher.num_synthetic)
    images, labels = sampling.sample_prior(*files, config, schema, others)
    assert labels.tolist() == [i % 3 for i in others] and images.shape[1:] == (8, 8, 1)
    network = train_classifier(images, labels, num_classes=3, num_epochs=1, seed=config.seed)
    stored = load_file(teacher)
    for name, value in network.state_dict().items():
        assert torch.allclose(stored[f"network.{name}"].float(), value.float(), atol=1e-4), name
    drawn, named = draw(trained | {"config": config}, range(60), teacher=teacher)
    judge = building.new_teacher(config, schema)
    load_model(judge, teacher)
    assert np.array_equal(named, judge.classify(drawn, torch.ones(3), num_views=config.teacher.num_views))


def test_samples_of_the_prior_have_its_means(trained):
    """What the decoder makes of a mean is what its samples are scattered around: the prior, and no denoiser."""
    codec = building.new_autoencoder(trained["config"], trained["schema"])
    load_model(codec.decoder, trained["decoder"])
    images, labels = sampling.sample_prior(
        trained["decoder"], trained["denoiser"], trained["config"], trained["schema"], range(600)
    )
    with torch.no_grad():
        latents = codec.encoder(building.to_tensor(images))
    means = load_file(trained["denoiser"])["prior.means"]
    found = torch.stack([latents[labels == c].mean(0) for c in range(3)])
    nearest = torch.cdist(found.flatten(1), means.flatten(1)).argmin(1)
    assert nearest.tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def taught_twice(trained, tmp_path_factory):
    """What :func:`stages.train_teacher` takes for a release with two teachers and copies of the private images."""
    values = trained["config"].model_dump()
    values["teacher"] |= {"first_share": 0.05, "num_copies": 1, "deformation": 1.0, "num_views": 2}
    values["teacher"]["dp_sgd"]["budget_share"] = 0.1
    config = type(trained["config"]).model_validate(values)
    plan = plan_release(config, num_classes=3, latent_dim=16, grouped=False)
    autoencoder = trained["folder"] / "autoencoder.safetensors"
    return (trained["train"], autoencoder, trained["decoder"], trained["denoiser"], config, plan)


def watched(inputs, folder, key_of=KEYS.__getitem__, **run):
    """Teach; the teacher's weights, (plan, key, units, checkpoint) of each head, and the labels each network learnt."""
    seen, labels_seen = [], []
    learn, head = stages.learn_features, stages.train_head

    def spy_learn(teacher, images, labels, config, *, seed):
        labels_seen.append(labels.copy())
        learn(teacher, images, labels, config, seed=seed)

    def spy_head(teacher, units, plan, key, config, **loop):
        seen.append((plan, key, units, loop["checkpoint"]))
        head(teacher, units, plan, key, config, **loop)

    folder.mkdir()
    with mock.patch.multiple(stages, learn_features=spy_learn, train_head=spy_head):
        path = stages.train_teacher(*inputs, key_of, stages.Run(folder, **run))
    return load_file(path), seen, labels_seen


def test_the_second_teacher_learns_what_the_first_one_says(trained, taught_twice, tmp_path):
    *_, config, plan = taught_twice
    asked = []
    read = stages.read_records
    key_of = lambda stage: asked.append(stage) or KEYS[stage]  # noqa: E731
    with mock.patch.object(stages, "read_records", lambda path: asked.append("read") or read(path)):
        _, seen, labels = watched(taught_twice, tmp_path / "run", key_of)
    assert asked == ["train_first_teacher", "train_teacher", "read"], "committed before private records are read"
    assert [(p, key) for p, key, _, _ in seen] == [(plan.mechanism(s), KEYS[s]) for s in asked[:2]]
    others = range(config.num_samples, config.num_samples + config.teacher.num_synthetic)
    _, drawn_for = draw(trained, others)
    assert np.array_equal(labels[0], drawn_for) and not np.array_equal(labels[1], drawn_for)
    for _, _, units, _ in seen:
        assert units.table.shape == (len(units.values) // 2, 2), "a record and its copy are one unit"


def test_an_interrupted_second_teacher_goes_on_from_the_names_that_the_first_one_gave(taught_twice, tmp_path):
    kept = tmp_path / "kept"
    saved = []
    once, seen, labels = watched(
        taught_twice, tmp_path / "a", binding="b", checkpoint=kept, on_checkpoint=lambda: saved.append(1)
    )
    assert [checkpoint for *_, checkpoint in seen] == [None, kept] and saved == [1]
    again, seen, same = watched(taught_twice, tmp_path / "b", binding="b", checkpoint=kept)
    assert [p.stage for p, *_ in seen] == ["train_teacher"] and np.array_equal(same[0], labels[1])
    assert all(torch.equal(again[name], value) for name, value in once.items())
    with pytest.raises(CheckpointError, match=r"names.* belongs to another plan or data set"):
        watched(taught_twice, tmp_path / "c", binding="other", checkpoint=kept)
    (kept / "names.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"names.* cannot be read"):
        watched(taught_twice, tmp_path / "d", binding="b", checkpoint=kept)


def test_stages_that_the_plan_leaves_out_learn_from_procedural_images_alone(trained, tmp_path):
    """Whatever the private images are: the decoder, and the denoiser around the prior, are those of the public seed."""
    config, schema = trained["config"], trained["schema"]
    whole = plan_release(config, num_classes=3, latent_dim=16, grouped=False)
    alone = whole.model_copy(update={"mechanisms": tuple(map(whole.mechanism, PRIOR))})
    other = tmp_path / "other"
    records = stages.read_records(trained["train"])
    write_records(other, dataclasses.replace(records, images=255 - records.images))
    files = {}
    for name, train in (("own", trained["train"]), ("other", other)):
        asked = []
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        run = stages.Run(folder)
        key_of = lambda stage, asked=asked: asked.append(stage) or KEYS[stage]  # noqa: E731
        autoencoder, decoder, _ = stages.train_codec(train, config, alone, key_of, run)
        assert asked == []
        latents, noise_std = stages.extract_latents(train, autoencoder, config, alone, key_of, run)
        denoiser, _ = stages.train_diffusion(latents, noise_std, config, schema, alone, key_of, run)
        assert asked == list(PRIOR)
        files[name] = load_file(decoder) | load_file(denoiser)
    same = {name for name, value in files["own"].items() if torch.equal(value, files["other"][name])}
    priors = {name for name in files["own"] if name.startswith("prior.")}
    assert set(files["own"]) - same <= priors and not priors <= same


def test_private_images_are_met_in_batches_of_one_size(monkeypatch):
    """A kernel that is chosen by the size of a batch may round otherwise: a record's pixels would follow the others."""
    sizes = []

    class Copying(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            sizes.append(len(x))
            return self.scale * x

    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)
    assert np.array_equal(stages.reconstruct(Copying(), building.to_tensor(images), batch_size=3), images)
    assert sizes == [3, 3, 3]
    model = torch.nn.Module()
    model.encoder = Copying()
    pixels = building.to_tensor(images)
    assert torch.equal(encode(model, pixels, batch_size=4), pixels) and sizes[3:] == [4, 4]
    teacher = PriorTeacher((8, 8, 1), 3)
    monkeypatch.setattr(teacher, "network", Copying())
    teacher.features(np.zeros((7, 8, 8, 1), np.uint8))
    assert sizes[5:] == [500]


def test_pixels_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    assert np.array_equal(building.to_uint8(building.to_tensor(images)), images)
    wide = building.to_uint8(torch.tensor([[[[-7.0, 9.0]]]]))
    assert wide.flatten().tolist() == [0, 255]


def test_shards_cover_every_sample_once():
    for n, k in ((10, 3), (7, 7), (5, 1)):
        assert [i for s in range(k) for i in sampling.shard_indices(n, s, k)] == list(range(n))


def test_equal_keys_and_data_give_equal_models_and_a_changed_plan_or_file_another_binding(trained, tmp_path):
    config, plan = trained["config"], plan_release(trained["config"], num_classes=3, latent_dim=16, grouped=False)
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run = stages.Run(tmp_path / name)
        files.append(stages.train_codec(trained["train"], config, plan, KEYS.__getitem__, run)[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    plans = [plan.model_dump_json(), plan.model_copy(update={"delta": 1e-6}).model_dump_json()]
    assert len({stages.binding_of(f, p) for f in (trained["train"], files[0]) for p in plans}) == 4
