"""AuraFlow as a family of models for fmg."""
