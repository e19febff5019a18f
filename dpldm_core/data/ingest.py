"""From a source to the two private parquet files that the stages read."""

from __future__ import annotations

from pathlib import Path

from dpldm_core.data.schema import ImageSchema, write_records
from dpldm_core.data.sources import load_dataset
from dpldm_core.data.split import SplitBy, split_records
from dpldm_core.errors import DataError

_SPLIT_BY: dict[str, SplitBy] = {"ADD_OR_REMOVE_ONE": "content", "REPLACE_ONE": "position"}


def ingest_dataset(
    dataset: str,
    folder: Path,
    *,
    split_key: bytes,
    data_root: str | None,
    cache_dir: str | None,
    num_classes: int | None,
    relation: str,
    schema: ImageSchema | None = None,
) -> tuple[Path, Path]:
    """Load, validate, split and write.

    Args:
        dataset: Built-in name, path or URI.
        folder: Where to write.
        split_key: Key of the held-out split, used when the source has no test set.
        data_root: Folder with MNIST and Fashion-MNIST.
        cache_dir: Where torchvision downloads to.
        num_classes: Declared public number of classes.
        relation: dp-accounting's name of the neighbouring relation of the plan: neighbours must stay neighbours.
        schema: What the plan was made for; None: nothing was planned yet.

    Returns:
        Paths of the training and the held-out records. Both private.

    Raises:
        DataError: The data cannot be used, or is of another format than the plan was made for.
    """
    loaded = load_dataset(dataset, data_root=data_root, cache_dir=cache_dir, num_classes=num_classes)
    if schema is not None and loaded.train.schema != schema:
        raise DataError(
            f"{dataset}: size, classes or persons of the images changed since the release was opened, and its plan is "
            f"for {schema.model_dump_json()}. Start a new release"
        )
    train, heldout = loaded.train, loaded.test
    if heldout is None:
        train, heldout = split_records(loaded.train, key=split_key, by=_SPLIT_BY[relation])
    paths = folder / "train.parquet", folder / "heldout.parquet"
    for path, records in zip(paths, (train, heldout), strict=True):
        write_records(path, records)
    return paths
