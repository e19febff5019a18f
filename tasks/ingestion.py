"""ingest: one parquet of training records and one of held-out records, private."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import CPU_TASK, data_root, download_folder, dpldm_task, work_folder
from tasks.artifacts import PRIVATE, HashedPrivateData, PrivateData, Release


@dpldm_task(**CPU_TASK)
def ingest(release: Release) -> HashedPrivateData:
    """Load and validate the private data and write it with the public schema; needs an open reservation."""
    from dpldm_core.data.ingest import ingest_dataset
    from dpldm_core.data.schema import ImageSchema
    from tasks import _tracking

    config = release.release_config()
    with _tracking.child_run(release.run_id, "ingest") as run:
        run.private_input(release.account)
        train, heldout = ingest_dataset(
            config.dataset,
            work_folder("ingest"),
            split_key=release.entry_id.encode(),
            data_root=data_root(),
            cache_dir=download_folder(),
            num_classes=config.num_classes,
            relation=release.release_plan().relation,
            schema=ImageSchema.model_validate_json(release.image_schema),
        )
        files = FlyteFile(str(train)), FlyteFile(str(heldout))
        return PrivateData(train=files[0], heldout=files[1], run_id=run.run_id, visibility=PRIVATE)
