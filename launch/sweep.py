"""`python launch/sweep.py …` is `tsae sweep …`."""

import sys

from tsae.cli import door

if __name__ == "__main__":
    sys.exit(door("sweep"))
