"""Flyte tasks: thin adapters between Flyte types and dpldm_core."""
