"""The former name of `python -m experiments.convergence`."""

import sys

from experiments.convergence.program import main

if __name__ == "__main__":
    sys.exit(main())
