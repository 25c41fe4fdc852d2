"""The Triton kernels, which know pointers and sizes only; ``ops`` launches them."""
