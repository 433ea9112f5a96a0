"""`python -P -m gptopt` (the flag keeps the working folder off the import path)."""

import sys

from gptopt.cli import main

sys.exit(main())
