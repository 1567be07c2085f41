"""Live-range attention on the CPU: the kernel in C++ (`native`), and PyTorch's operators in its place (`attention`, `schedule`)."""
