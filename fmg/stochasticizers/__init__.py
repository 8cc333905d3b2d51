"""Stochasticizers turn a deterministic flow map into a policy. Importing this package does not import torch."""
