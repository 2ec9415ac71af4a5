"""The documentation, and what reads it from the code."""
