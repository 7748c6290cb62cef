"""``python -m bench.gpu STEP``: see steps.py."""

import sys

from bench.gpu.steps import main

if __name__ == "__main__":
    sys.exit(main())
