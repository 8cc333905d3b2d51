"""Pretraining of the embedded models of a world, from nothing, on a CPU."""
