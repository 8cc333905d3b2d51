"""Types, protocols, errors and events that every room shares. Importing this package does not import torch."""
