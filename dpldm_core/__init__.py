"""Differentially private latent diffusion: the library. Importing it imports neither torch nor Flyte nor MLflow."""
