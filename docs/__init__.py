"""Reads the structure of the code, which README's table describes."""
