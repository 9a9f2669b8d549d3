"""``python -m weightops``: the command line."""

import sys

from weightops.cli import main

sys.exit(main())
