"""``python -m dmagent_loader.cli``."""

import sys

from dmagent_loader.cli import main

sys.exit(main())
