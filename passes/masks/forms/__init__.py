"""Forms of masks that need more than the algebra: one file each."""
