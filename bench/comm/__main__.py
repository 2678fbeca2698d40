import sys

from bench.comm.program import main

sys.exit(main())
