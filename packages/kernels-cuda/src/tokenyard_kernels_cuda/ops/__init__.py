"""The kernels as custom ops: what to launch for given tensors, with fake kernels and gradients."""
