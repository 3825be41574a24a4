"""The sender process; see mlflow_tracker.py."""

import sys

from pretrain.tracking.mlflow_tracker import main

sys.exit(main())
