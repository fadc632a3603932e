"""`python -m latent_tiles`, where the `latent-tiles` script is not on the path."""

import sys

from latent_tiles.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
