"""Custom ops around the kernels: what PyTorch sees, with fake kernels and gradients."""
