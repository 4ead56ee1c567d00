"""The live view in a terminal; see __main__.py."""
