"""A reward and a stochasticizer for fmg."""
