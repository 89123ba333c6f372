"""Convolutional networks that decide per input which channels and columns to compute."""
