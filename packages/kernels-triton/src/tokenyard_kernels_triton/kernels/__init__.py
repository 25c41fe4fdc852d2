"""The Triton kernels. They see pointers and sizes only; ``ops`` launches them."""
