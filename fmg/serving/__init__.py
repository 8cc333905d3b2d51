"""The foundation of fmg's HTTP servers: batches across clients, limits, a token, slow and vanished clients, draining.

Imports no torch: an artifact is served without it.
"""
