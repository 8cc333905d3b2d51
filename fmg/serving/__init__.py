"""The foundation of fmg's HTTP servers: batching, limits, a token, slow and disconnected clients, draining.

Imports no torch: an artifact is served without it.
"""
