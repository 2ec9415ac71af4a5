"""What README shows of the code, drawn from it."""
