"""What the benchmarks share. They import it first: with it, the modules of `examples/` can be imported, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
