"""The reward server: pictures and prompts in, scores out. No pickle, and nothing that a client sends is run."""
