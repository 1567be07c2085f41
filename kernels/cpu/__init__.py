"""Live-range attention on the CPU: the kernel in C++ (`native`), and the same by PyTorch's operators (`attention`, `schedule`)."""
