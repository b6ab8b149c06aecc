"""Let `python -m pykalm` be `kalm`, as launchers of many processes want it: `accelerate launch -m pykalm train ...`."""

import sys

from pykalm.cli import main

if __name__ == "__main__":
    sys.exit(main())
