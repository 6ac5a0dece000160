"""`python launch/status.py FILE`: the same as `tsae status FILE`."""

import sys

from tsae.sweep.status import main

if __name__ == "__main__":
    sys.exit(main())
