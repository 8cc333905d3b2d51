"""SANA-Sprint: a single-time consistency model on the trig path with linear attention."""
