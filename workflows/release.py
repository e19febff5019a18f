"""The release workflows. Run: pyflyte run workflows/release.py release_pipeline --help."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from flytekit import map_task, workflow

from tasks.autoencoder import train_autoencoder
from tasks.closing import close_failed_release
from tasks.diffusion import train_diffusion
from tasks.evaluation import evaluate
from tasks.ingestion import ingest
from tasks.latents import extract_latents
from tasks.opening import open_release
from tasks.publication import publish, resample
from tasks.sampling import sample_shard
from tasks.teacher import train_teacher


class Result(NamedTuple):
    """Where the bundle is and what it promises."""

    bundle: str
    release_id: str
    epsilon: float
    delta: float


@workflow(on_failure=close_failed_release)
def release_pipeline(
    dataset: str = "mnist5k",
    epsilon: float = 10.0,
    delta: float = 1e-5,
    preset: str = "quick",
    num_samples: int = 0,
    latent_mechanism: str = "dp_sgd",
    budget_epsilon: float = 0.0,
    out: str = "releases",
    config: str = "",
    publish_metrics: bool = False,
) -> Result:
    """Publish a synthetic image data set with an end-to-end (epsilon, delta) promise.

    Args:
        dataset: mnist5k, mnist, fashion_mnist, or a path or s3:// URI of your own images (npz, IDX, parquet, folder).
        epsilon: Privacy budget of this release, for all stages together. 1 is strong, 10 is common.
        delta: Probability that the promise may fail; well below 1 / (number of records).
        preset: quick (minutes on 2 cores), cpu (half an hour), long (an hour or two), gpu (one GPU; never run).
        num_samples: Synthetic images; 0 takes the preset's number.
        latent_mechanism: dp_sgd, or noised_latents (each latent is noised; the trust boundary moves before stage 2).
        budget_epsilon: Cap of a new account; 0 sets none for built-in sets, and just this release for own data.
        out: Folder or s3:// URI that the bundle is written to.
        config: JSON or YAML file that overrides single fields of the preset; unknown keys are refused.
        publish_metrics: Release the accuracy on held-out private records too; a small part of epsilon pays for it.

    Returns:
        Where the bundle is, its id, and the epsilon and delta it promises.
    """
    release, shards = open_release(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        latent_mechanism=latent_mechanism,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
        publish_metrics=publish_metrics,
    )
    data = ingest(release=release)
    codec = train_autoencoder(release=release, data=data)
    latents = extract_latents(release=release, data=data, codec=codec)
    model = train_diffusion(release=release, latents=latents)
    teacher = train_teacher(release=release, data=data, codec=codec, model=model)
    draw = partial(sample_shard, release=release, codec=codec, model=model, teacher=teacher)
    images = map_task(draw)(shard=shards)
    measured = evaluate(release=release, data=data, shards=images)
    done = publish(release=release, codec=codec, model=model, teacher=teacher, shards=images, evaluation=measured)
    return Result(done.bundle, done.release_id, done.epsilon, done.delta)


@workflow
def resample_pipeline(
    bundle: str, num_samples: int = 10000, seed: int = 1, guidance: float = -1.0, out: str = "releases"
) -> Result:
    """Draw more images from the models of a published bundle, at no privacy cost, as a new bundle.

    Args:
        bundle: Folder or URI of the published bundle.
        num_samples: Synthetic images.
        seed: Seed of the sampler; the same seed gives the same images, up to the rounding of the processor.
        guidance: Mean strength of class guidance, e.g. 8, of every second image or so: it looks more like its class.
            0 for none, -1 for the release's own.
        out: Folder or s3:// URI that the new bundle is written to.

    Returns:
        Where the new bundle is, its id, and the unchanged epsilon and delta.
    """
    done = resample(bundle=bundle, num_samples=num_samples, seed=seed, guidance=guidance, out=out)
    return Result(done.bundle, done.release_id, done.epsilon, done.delta)
