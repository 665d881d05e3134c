"""``python -m qwen3_kernels doctor``"""

import argparse
import sys

from .doctor import main

parser = argparse.ArgumentParser(prog="python -m qwen3_kernels", description="Drop-in kernels for the Qwen3 family.")
parser.add_argument("command", choices=["doctor"], help="doctor: which backend would run each op here, and why")
parser.parse_args()
sys.exit(main())
