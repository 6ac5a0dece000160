"""`python launch/report.py …` is `tsae report …`."""

import sys

from tsae.cli import door

if __name__ == "__main__":
    sys.exit(door("report"))
