"""The published bundle, its card and its verifier."""
