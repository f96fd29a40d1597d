"""Which modules of the pool a sample gets."""

from __future__ import annotations

NO_SET = -1
