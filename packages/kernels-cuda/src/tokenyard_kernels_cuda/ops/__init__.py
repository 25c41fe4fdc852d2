"""Custom operators over the kernels: launch configuration, fake kernels and gradients."""
