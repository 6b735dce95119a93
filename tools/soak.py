"""Shim of tests/soak.py: python tools/soak.py --config=... --workdir=DIR; see its --help."""

import pathlib
import runpy

if __name__ == "__main__":
    script = pathlib.Path(__file__).resolve().parents[1] / "tests" / "soak.py"
    runpy.run_path(str(script), run_name="__main__")
