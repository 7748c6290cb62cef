"""What the compiler makes of the kernels, and what they move: counted without a GPU."""
