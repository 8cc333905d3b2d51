"""Shared by all families of flow maps: adapters, saving and its round-trip check, text embeddings, weight loading."""
