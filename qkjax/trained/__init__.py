"""A finished run, opened: surgery, generation, determinism."""
