"""Live-range attention on the CPU: the schedule of tiles, and the kernel that follows it."""
