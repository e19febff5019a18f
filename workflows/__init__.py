"""Flyte workflows: compose tasks, pass promises, nothing else."""
