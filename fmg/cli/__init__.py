"""The command line: the only sub-package that prints. Importing it imports neither torch nor the registry."""
