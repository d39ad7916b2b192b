"""What a member imports (`--imports`) to join later than those of other hosts: it sleeps if its host is late."""

from __future__ import annotations

import os
import time

LATE_S = "MILLRACE_TEST_LATE_S"

time.sleep(float(os.environ.get(LATE_S, "0")))
