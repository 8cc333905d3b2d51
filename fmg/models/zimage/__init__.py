"""Z-Image-Turbo: a velocity network distilled for eight Euler steps."""
