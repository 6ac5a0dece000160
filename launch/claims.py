"""`python launch/claims.py FILE`: the same as `tsae claims FILE`."""

import sys

from tsae.report.claims import main

if __name__ == "__main__":
    sys.exit(main())
