"""``python -m humanline``, which ``torchrun -m humanline`` runs too."""

import sys

from humanline.cli import main

sys.exit(main())
