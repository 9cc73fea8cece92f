"""Pure loss functions; the equations are in their docstrings."""
