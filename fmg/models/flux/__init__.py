"""FLUX-class flow maps, from a 2 M parameter embedded model to the published 8 B students."""
