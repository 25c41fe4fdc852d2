"""`tokenyard bench train`: the speed of training."""
