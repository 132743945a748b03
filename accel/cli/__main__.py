"""`python -m accel.cli` is `accel`."""

import sys

from .main import main

sys.exit(main())
