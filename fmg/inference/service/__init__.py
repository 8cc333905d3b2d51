"""The image server: prompts in, images out, over the images API of OpenAI. Nothing that a client sends is run."""
