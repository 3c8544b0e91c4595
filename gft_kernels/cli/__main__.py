"""`python -m gft_kernels.cli`: the command gft without its console script."""

import sys

from gft_kernels.cli import main

sys.exit(main())
