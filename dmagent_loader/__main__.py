"""``python -m dmagent_loader``: the command line ``dmagent``."""

import sys

from dmagent_loader.cli import main

sys.exit(main())
