"""One custom training step: which requests it takes, and what they carry."""
