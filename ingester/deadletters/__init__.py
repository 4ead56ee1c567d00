"""The dead letters at the command line; see __main__.py."""
