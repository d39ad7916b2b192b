"""One thread traces at a time.

Torch keeps what a tracer is doing (the mark of the node it is at, whether to copy marks, patches of its own functions)
in variables of the process, not of the thread. Inductor traces, too: a step that was traced while a compiler ran in
another thread of the same process came out with the marks of its nodes lost.
"""

from __future__ import annotations

import threading

alone = threading.RLock()  # hold it wherever torch traces
