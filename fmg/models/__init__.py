"""Generators: loading, conditioning, adapters and saving. Importing this package does not import torch."""
