"""The command line: the only room that prints. Importing it imports neither torch nor the registry."""
