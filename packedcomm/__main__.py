"""`python -m packedcomm`: the command line."""

import sys

from packedcomm.cli.main import main

if __name__ == "__main__":  # a spawned process imports this module again under another name
    sys.exit(main())
