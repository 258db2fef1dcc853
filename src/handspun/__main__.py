"""`python -m handspun` is the same program as `handspun`."""

import sys

from handspun.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
