"""FLUX.2 [klein]: velocity networks distilled for four Euler steps."""
