"""Prompt sets, run folders and pictures of runs. Importing this package does not import torch."""
