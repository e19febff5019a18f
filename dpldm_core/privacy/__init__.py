"""Mechanisms, accounting, noise and ledger. Knows no images."""
