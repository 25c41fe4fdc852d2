"""Custom operators that launch the kernels, with fake kernels and gradients for PyTorch."""
