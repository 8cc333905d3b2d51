"""FLUX.3 [klein]: a two-time flow map of diffusers' own class."""
