"""`python -m mome_sdk`: the same as `mome`."""

import sys

from mome_sdk.cli import main

sys.exit(main())
