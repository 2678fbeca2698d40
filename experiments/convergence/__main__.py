import sys

from experiments.convergence.program import main

sys.exit(main())
