"""`python -m tsae` is the command `tsae`, also where its script is not on the path."""

import sys

from tsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
