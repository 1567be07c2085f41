"""Live-range attention on the CPU: in C++ (`native`), or, without a compiler, in PyTorch's operators (`attention`)."""
