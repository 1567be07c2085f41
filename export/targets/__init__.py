"""Targets: each writes an artifact and opens what it wrote; `rewriter.export.registry` lists them."""
