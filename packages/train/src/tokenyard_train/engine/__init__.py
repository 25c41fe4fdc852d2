"""Training: setting a run up, the loop, a step, and what surrounds them."""
