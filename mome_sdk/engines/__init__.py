"""Backends: one file each; the file name is the engine name."""
