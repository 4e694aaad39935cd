"""Developer tools; not needed to run the pack."""
