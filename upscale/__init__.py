"""Growth: make a model wider without changing its function, from any source of tensors to any layout."""
