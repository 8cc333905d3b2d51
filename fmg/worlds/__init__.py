"""Worlds: procedural tasks, each with a renderer, prompts and rewards, on which the embedded models are trained."""
