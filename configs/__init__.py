"""Bundled model and config files, read through importlib.resources."""
