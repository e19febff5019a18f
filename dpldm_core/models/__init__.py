"""Networks. Says no word of privacy."""
