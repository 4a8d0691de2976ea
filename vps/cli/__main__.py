"""``python -m vps.cli``."""

import sys

from vps.cli import main

sys.exit(main())
