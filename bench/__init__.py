"""Speed of the optimizers beside torch's: `python -m pytest bench`, `python -m bench.report --out DIR`."""
