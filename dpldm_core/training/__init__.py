"""Training loops of the stages and their saved state."""
