"""The sender process; see sender.py."""

import sys

from pretrain.tracking.sender import main

sys.exit(main())
