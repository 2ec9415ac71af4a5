"""Training loops of tinker-cookbook, driven against the embedded trainer."""
