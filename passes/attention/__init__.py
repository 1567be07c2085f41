"""Finding the attention of a graph."""
