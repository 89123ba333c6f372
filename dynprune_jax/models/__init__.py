"""Architectures, one file each; nothing here knows of pruning or of a config."""
