"""`python launch/status.py …` is `tsae status …`."""

import sys

from tsae.cli import door

if __name__ == "__main__":
    sys.exit(door("status"))
