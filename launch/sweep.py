"""`python launch/sweep.py FILE`: the same as `tsae sweep FILE`."""

import sys

from tsae.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
