"""Evaluation of models on prompt sets, with intervals, paired image by image when two are compared."""
