"""`python -m lavish`: the command `lavish`, also where its script is not on the path."""

import sys

from lavish.cli import main

if __name__ == "__main__":
    sys.exit(main())
