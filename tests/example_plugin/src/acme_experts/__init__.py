"""An expert kernel for tokenyard."""
