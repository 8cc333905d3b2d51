"""What all families of flow maps share: adapters, saving and its round-trip check, text embeddings, weight loading."""
