"""Masks and ranges read as formulas, and a solver asked whether they agree at all sizes."""
