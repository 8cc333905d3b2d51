"""From a recipe to a trained adapter: composition, the loop, its gates, checkpoints. Importing it imports no torch."""
