"""Rewards: scores of images against prompts. Importing this package does not import torch."""
