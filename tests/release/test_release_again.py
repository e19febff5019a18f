"""Sampling again from a published bundle: what it refuses."""

import pytest

from dpldm_core.errors import ConfigError
from dpldm_core.release.publishing import resample_release


@pytest.mark.parametrize(
    ("field", "value"), [("num_samples", 0), ("seed", -1), ("guidance", -2.0), ("guidance", float("inf"))]
)
def test_sampling_again_refuses_numbers_out_of_range_before_it_reads_the_bundle(tmp_path, field, value):
    arguments = {"num_samples": 5, "seed": 1, "guidance": 0.0} | {field: value}
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        resample_release(str(tmp_path / "none"), **arguments, out=str(tmp_path), work=tmp_path)
