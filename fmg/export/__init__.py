"""What leaves a run for other software. Importing this package does not import torch."""
