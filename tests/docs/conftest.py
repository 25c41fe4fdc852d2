"""Lets tests import the modules beside them, and those that the site is made with."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools" / "docs")]
