"""Shim of benchmarks/run.py: python tools/benchmark.py SUBJECT [--shape=...]; see its --help."""

import pathlib
import runpy

if __name__ == "__main__":
    script = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    runpy.run_path(str(script), run_name="__main__")
