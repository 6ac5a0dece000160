"""`python launch/claims.py …` is `tsae claims …`."""

import sys

from tsae.cli import door

if __name__ == "__main__":
    sys.exit(door("claims"))
