"""Experiments around a trained network, each a function of (config, workdir)."""
