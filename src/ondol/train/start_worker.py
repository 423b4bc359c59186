"""What a rollout worker's process begins with, before anything that takes time to import: it ends with its parent, also when frozen.

python -m ondol.train.start_worker RECIPE OWNER THREADS      # commands come as JSON lines on its standard input
"""

import sys

from ondol.sandbox.child import end_with_the_parent

if __name__ == "__main__":
    end_with_the_parent()
    from ondol.train.processes import main

    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
