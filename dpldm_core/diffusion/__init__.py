"""Losses, schedules and samplers: pure functions of a denoiser."""
