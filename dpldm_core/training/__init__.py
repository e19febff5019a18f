"""Training loops of the two stages and their saved state."""
