"""What the package is built on: rules, formats, checks, hyperparameters, random bits, and the compiled module."""
