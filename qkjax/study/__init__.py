"""The study's side that reads files: spectra of runs, figures. It imports no jax."""
