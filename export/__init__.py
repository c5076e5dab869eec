"""Checkpoint to deployable files."""
