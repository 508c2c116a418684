"""Makes the flat modules importable from the tests, and leaves room for others on the machine."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(2)
