"""Trains the embedded models of a world from random weights, on a CPU: `fmg pretrain` in a checkout.

It is not part of the installed package: the models it makes ship in `fmg/assets`, and using them takes none of this.
"""
