"""Pretraining of the two embedded models of the shapes world, from nothing, on a CPU."""
