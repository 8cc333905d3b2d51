"""Exports runs for other software. Importing this package does not import torch."""
