"""Types, protocols, errors and events that all sub-packages share. Importing this package does not import torch."""
