"""The remote model as a differentiable JAX function, and its optimizer."""
