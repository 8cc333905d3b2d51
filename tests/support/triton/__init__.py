"""A stand-in for a Triton server: its module for Python models, its checks of a repository, its HTTP protocol."""
