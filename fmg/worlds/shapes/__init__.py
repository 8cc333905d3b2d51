"""The shapes world: one to three coloured shapes on a plain background, prompts about them, and a verifier."""
