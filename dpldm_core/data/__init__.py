"""Sources, public schema and split of image records."""
