"""Tensors of which each process holds a part, and which look whole to the code that works with them."""
