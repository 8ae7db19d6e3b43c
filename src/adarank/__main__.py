"""`python -m adarank`: the command line."""

import sys

from adarank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
