"""Prompt sets, run folders, and figures of runs. Importing this package does not import torch."""
