"""What every family of flow maps shares: adapters, saving and its proof, text embeddings, strict loading of weights."""
