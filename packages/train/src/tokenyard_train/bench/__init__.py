"""Measuring layers, their pieces and training, beside dense products and peers."""
