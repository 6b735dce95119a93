"""Trained parameters as a directory that stock Hugging Face classes load, and the proof of it."""
