"""`python -m mpq`, which is also what `accelerate launch -m mpq` runs."""

from __future__ import annotations

import sys

from mpq.cli import main

sys.exit(main())
