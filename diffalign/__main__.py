"""`python -m diffalign`, also for `accelerate launch -m diffalign train CONFIG`."""

import sys

from diffalign.cli import main

sys.exit(main())
