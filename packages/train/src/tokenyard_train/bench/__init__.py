"""`tokenyard bench train`: measure the speed of training."""
