"""The text world: signs of three letters in one of a few colours, prompts that quote them, and how clean they look."""
