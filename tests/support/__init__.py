"""Code shared by tests: identity checks, and the machinery that runs them on mutated sources."""
