"""`qkjax reproduction` of this checkout. python tools/compare_studies.py --help lists its flags."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qkjax import commands

if __name__ == "__main__":
    commands.run("reproduction")
