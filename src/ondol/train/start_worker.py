"""What a rollout worker's process begins with, before anything that takes time to import: it ends with its parent, also when frozen.

python -m ondol.train.start_worker RECIPE OWNER THREADS      # commands come as JSON lines on its standard input
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_the_parent() -> None:
    """Linux sees to it; elsewhere a worker ends when its standard input does."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    end_with_the_parent()
    from ondol.train.processes import main

    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
