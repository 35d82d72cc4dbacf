"""`python -m diffalign.cli`: the same as `diffalign`."""

import sys

from diffalign.cli import main

sys.exit(main())
