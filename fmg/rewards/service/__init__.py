"""The reward server: images and prompts in, scores out. No pickle, and nothing that a client sends is executed."""
