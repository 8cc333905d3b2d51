"""The image server: prompts in, images out, over OpenAI's images API. Nothing that a client sends is executed."""
