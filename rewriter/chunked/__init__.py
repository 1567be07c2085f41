"""Chunked eviction: long contexts read in chunks (ParallelComp, arXiv 2502.14317)."""
