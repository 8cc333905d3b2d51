"""Worlds: procedural tasks with a renderer, prompts and a verifier, and the pretraining of their embedded models."""
