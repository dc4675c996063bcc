"""`python -m qlorag.recipes.cli`: the same command line without the installed script."""

import sys

from .main import main

sys.exit(main())
