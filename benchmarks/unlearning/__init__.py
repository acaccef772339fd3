"""Unlearning benchmarks: what forgets better, at what price, and how sure that is. See ``docs/benchmarks.md``."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:  # Rows, encoding, small models and scores are those of the examples.
    sys.path.append(str(EXAMPLES))
