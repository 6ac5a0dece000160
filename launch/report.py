"""`python launch/report.py FILE`: the same as `tsae report FILE`."""

import sys

from tsae.report.command import main

if __name__ == "__main__":
    sys.exit(main())
