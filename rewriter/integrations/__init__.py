"""Adapters to other libraries, each of which is needed for its adapter alone."""
