"""Files, command line, registry and run records; imports nothing else of the package."""
