"""The stages of a release as functions from files to files; what the Flyte tasks call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema, Records, group_table, read_records
from dpldm_core.models.autoencoder import Autoencoder, whitening
from dpldm_core.models.batches import in_equal_batches
from dpldm_core.models.teacher import LabelTeacher
from dpldm_core.privacy.calibration import (
    AUTOENCODER,
    COVARIANCES,
    DIFFUSION,
    FIRST_TEACHER,
    LABELS,
    LATENTS,
    MEANS,
    TEACHER,
)
from dpldm_core.privacy.one_shot import noisy_records
from dpldm_core.privacy.plan import GaussianRecordPlan, GaussianSumPlan, ReleasePlan
from dpldm_core.rng import SecretKey
from dpldm_core.threads import settle_on_cpu
from dpldm_core.training.autoencoder import encode, pretrain_autoencoder, train_autoencoder
from dpldm_core.training.building import new_autoencoder, new_denoiser, new_teacher, to_tensor, to_uint8
from dpldm_core.training.diffusion import pretrain_denoiser, train_denoiser, train_denoiser_on_released
from dpldm_core.training.prior import fit_released_prior, release_prior
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.sampling import sample_images, sample_prior
from dpldm_core.training.state import load_model, load_names, save_model, save_names
from dpldm_core.training.teacher import deformed_copies, learn_features, train_head
from dpldm_core.training.units import Units

StageKey = Callable[[str], SecretKey]


@dataclass(frozen=True)
class Run:
    """What one attempt at a stage runs with. None of it can change the guarantee.

    Args:
        folder: Where results are written.
        binding: Digest of plan and data, from :func:`binding_of`; other code is refused by the ledger.
        checkpoint: Folder to resume from and save to.
        on_checkpoint: Called after each save.
        train: The DP-SGD loop; an audit gives one that adds canaries.
    """

    folder: Path
    binding: str = ""
    checkpoint: Path | None = None
    on_checkpoint: Callable[[], None] | None = None
    train: TrainLoop = train_private

    @property
    def device(self) -> str:
        """A GPU when there is one."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def loop(self, config: ReleaseConfig, num_classes: int) -> dict[str, object]:
        """Arguments of the shared training loop."""
        return {
            "num_classes": num_classes,
            "performance": config.performance,
            "binding": self.binding,
            "checkpoint": self.checkpoint,
            "on_checkpoint": self.on_checkpoint,
            "train": self.train,
        }


def binding_of(data: str | Path, plan_json: str) -> str:
    """Digest of a private file and a plan: a checkpoint of another pair is refused (the ledger refuses other code)."""
    digest = hashlib.sha256(plan_json.encode())
    digest.update(Path(data).read_bytes())
    return digest.hexdigest()


def train_codec(
    train: Path, config: ReleaseConfig, plan: ReleasePlan, key_of: StageKey, run: Run
) -> tuple[Path, Path, list[float]]:
    """Stage 1: procedural images, then private ones with DP-SGD where the plan has it.

    Args:
        train: Private training records.
        config: The resolved configuration.
        plan: The release's plan.
        key_of: Secret key of a stage; asked for before the mechanism of that stage runs.
        run: Folder, checkpoint and callbacks.

    Returns:
        (autoencoder, decoder, curve): the whole model for inside use, the public decoder, and the public loss curve on
        procedural images.
    """
    settle_on_cpu()
    key = key_of(AUTOENCODER) if AUTOENCODER in plan.stages() else None
    records = read_records(train)
    model = new_autoencoder(config, records.schema)
    curve = pretrain_autoencoder(model, config.autoencoder, seed=config.seed)
    if key is not None:
        units = _units(records, to_tensor(records.images), config).to(run.device)
        mechanism = plan.mechanism(AUTOENCODER)
        loop = run.loop(config, records.schema.num_classes)
        model = train_autoencoder(model.to(run.device), units, mechanism, key, config.autoencoder, **loop)  # type: ignore[arg-type]
    paths = run.folder / "autoencoder.safetensors", run.folder / "decoder.safetensors"
    save_model(model, paths[0])
    save_model(model.decoder, paths[1])
    return *paths, curve


def extract_latents(
    train: Path, autoencoder: Path, config: ReleaseConfig, plan: ReleasePlan, key_of: StageKey, run: Run
) -> tuple[Path, float]:
    """Encode the private records: private latents, or released ones, whitened, in the mode ``noised_latents``.

    Args:
        train: Private training records.
        autoencoder: The whole trained model.
        config: The resolved configuration.
        plan: The release's plan.
        key_of: Secret key of a stage; asked for before the mechanism of that stage runs.
        run: Folder.

    Returns:
        (latents, noise_std): a safetensors file with latents, labels and the table of units, and the standard deviation
        of the noise that the latents carry (0 when they are private).
    """
    records = read_records(train)
    model = new_autoencoder(config, records.schema)
    load_model(model, autoencoder)
    units = _units(records, encode(model, to_tensor(records.images)), config)
    latents, labels, noise_std = units.values, units.class_labels, 0.0
    if config.latent_mechanism == "noised_latents":
        kept = _full_rows(units.table)
        mechanism = plan.mechanism(LATENTS)
        assert isinstance(mechanism, GaussianRecordPlan)
        per_unit = units.table.shape[1]
        white = whitening(model.encoder.transform.latent_shape)  # of the noise, each coordinate gets its share
        latents = noisy_records(mechanism, key_of(LATENTS), latents[kept] @ white.T, per_unit)
        labels = labels[kept]
        if records.schema.num_classes > 1:
            released = plan.mechanism(LABELS).randomize(key_of(LABELS), labels.numpy())  # type: ignore[union-attr]
            labels = torch.from_numpy(released)
        noise_std = mechanism.noise_multiplier * mechanism.max_norm
        units = Units(latents, labels, torch.arange(len(latents))[:, None])
    path = run.folder / "latents.safetensors"
    save_file({"latents": latents.contiguous(), "labels": labels.contiguous(), "table": units.table.contiguous()}, path)
    return path, noise_std


def train_diffusion(
    latents: Path,
    noise_std: float,
    config: ReleaseConfig,
    schema: ImageSchema,
    plan: ReleasePlan,
    key_of: StageKey,
    run: Run,
) -> tuple[Path, list[float]]:
    """Stage 2.

    Args:
        latents: From :func:`extract_latents`.
        noise_std: Noise that the latents carry; above 0 they are released and training on them is free.
        config: The resolved configuration.
        schema: Public schema.
        plan: The release's plan.
        key_of: Secret key of a stage; asked for before the mechanism of that stage runs.
        run: Folder, checkpoint and callbacks.

    Returns:
        (denoiser, curve): the public model, and its public loss curve: on procedural images, or on released latents.
    """
    settle_on_cpu()
    model = new_denoiser(config, schema, noise_std)
    tensors = load_file(latents)
    path = run.folder / "denoiser.safetensors"
    if config.latent_mechanism == "noised_latents":
        replaced = plan.mechanism(LABELS).noise_parameter if schema.num_classes > 1 else 0.0  # type: ignore[union-attr]
        fit_released_prior(model.prior, tensors["latents"], tensors["labels"], noise_std, replaced, config.prior)
        settings = config.noised_latents
        trained, curve = train_denoiser_on_released(
            model.to(run.device),
            tensors["latents"].to(run.device),
            tensors["labels"].to(run.device),
            config.diffusion,
            num_steps=settings.num_steps,
            batch_size=settings.batch_size,
            seed=config.seed,
        )
    else:
        units = Units(tensors["latents"], tensors["labels"], tensors["table"])
        means, covariances = plan.mechanism(MEANS), plan.mechanism(COVARIANCES)
        assert isinstance(means, GaussianSumPlan) and isinstance(covariances, GaussianSumPlan)
        encoder = new_autoencoder(config, schema).encoder
        curve = pretrain_denoiser(model.to(run.device), encoder, config.diffusion, seed=config.seed)
        model.cpu()
        white = whitening(encoder.transform.latent_shape)
        release_prior(model.prior, units, (means, covariances), key_of, config.prior, white)
        trained = model.to(run.device)
        if DIFFUSION in plan.stages():
            loop = run.loop(config, schema.num_classes)
            mechanism, key = plan.mechanism(DIFFUSION), key_of(DIFFUSION)
            trained = train_denoiser(trained, units.to(run.device), mechanism, key, config.diffusion, **loop)  # type: ignore[arg-type]
    save_model(trained, path)
    return path, curve


def train_teacher(
    train: Path,
    autoencoder: Path,
    decoder: Path,
    denoiser: Path,
    config: ReleaseConfig,
    plan: ReleasePlan,
    key_of: StageKey,
    run: Run,
) -> Path:
    """The label teacher: it learns what synthetic images look like, then, with DP-SGD, which class they belong to.

    The private images pass through the autoencoder first, so that the teacher meets both kinds with the same softness.
    Where the plan has a first teacher, that one names the synthetic images that the other learns features from.

    Args:
        train: Private training records.
        autoencoder: The whole trained model.
        decoder: Public model file.
        denoiser: Public model file.
        config: The resolved configuration.
        plan: The release's plan.
        key_of: Secret key of a stage; asked for before private records are read.
        run: Folder, checkpoint and callbacks.

    Returns:
        The teacher, a public model file.
    """
    keys = {stage: key_of(stage) for stage in (FIRST_TEACHER, TEACHER) if stage in plan.stages()}
    records = read_records(train)
    schema = records.schema
    others = range(config.num_samples, config.num_samples + config.teacher.num_synthetic)
    images, labels = sample_images(decoder, denoiser, config, schema, others)
    codec = new_autoencoder(config, schema)
    load_model(codec, autoencoder)
    private = reconstruct(codec.to(run.device), to_tensor(records.images))
    copies = deformed_copies(private, config.teacher, seed=config.seed)

    def taught(stage: str, labels: np.ndarray, run: Run) -> LabelTeacher:
        teacher = new_teacher(config, schema)
        learn_features(teacher, images, labels, config.teacher, seed=config.seed)
        units = _units(records, teacher.features(private), config)
        if len(copies) > 0:
            units = units.with_copies(teacher.features(copies))
        loop = run.loop(config, schema.num_classes)
        train_head(teacher, units.to(run.device), plan.mechanism(stage), keys[stage], config.teacher, **loop)  # type: ignore[arg-type]
        return teacher

    if FIRST_TEACHER in keys:
        names = load_names(run.checkpoint, run.binding) if run.checkpoint else None
        if names is None:  # else an earlier attempt asked: one noise, one answer
            first = taught(FIRST_TEACHER, labels, replace(run, checkpoint=None, on_checkpoint=None))
            shares = load_file(denoiser)["prior.shares"]
            names = first.classify(images, shares, num_views=config.teacher.num_views)
            if run.checkpoint:
                save_names(names, run.checkpoint, run.binding)
            if run.on_checkpoint:
                run.on_checkpoint()
        labels = names
    path = run.folder / "teacher.safetensors"
    save_model(taught(TEACHER, labels, run), path)
    return path


def teach_from_prior(decoder: Path, denoiser: Path, config: ReleaseConfig, schema: ImageSchema, run: Run) -> Path:
    """The label teacher of a release whose plan has none: it learns from samples of the prior alone, free of charge.

    Args:
        decoder: Public model file.
        denoiser: Public model file.
        config: The resolved configuration.
        schema: Public schema.
        run: Folder.

    Returns:
        The teacher, a public model file.
    """
    others = range(config.num_samples, config.num_samples + config.teacher.num_synthetic)
    images, labels = sample_prior(decoder, denoiser, config, schema, others)
    teacher = new_teacher(config, schema)
    learn_features(teacher, images, labels, config.teacher, seed=config.seed)
    path = run.folder / "teacher.safetensors"
    save_model(teacher, path)
    return path


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor, *, batch_size: int = 1000) -> np.ndarray:
    """Private images after encoding and decoding (private), uint8 [n, h, w, c]."""
    autoencoder.eval()
    device = next(autoencoder.parameters()).device

    def decode(some: Tensor) -> Tensor:
        return torch.from_numpy(to_uint8(autoencoder(some.to(device))))

    return in_equal_batches(decode, images, batch_size).numpy()


def _units(records: Records, values: Tensor, config: ReleaseConfig) -> Units:
    table = group_table(records, config.max_records_per_group if records.schema.grouped else 1)
    return Units(values, torch.from_numpy(records.labels), torch.from_numpy(table))


def _full_rows(table: Tensor) -> Tensor:
    """Record indices with every unit's M slots filled by its own records in turn, [units M].

    So every unit releases as many latents, and the number of them does not tell how many records a person has.
    """
    counts = (table >= 0).sum(1, keepdim=True)
    return table.gather(1, torch.arange(table.shape[1])[None] % counts).flatten()
