import sys

from experiments.recipe.program import main

sys.exit(main())
