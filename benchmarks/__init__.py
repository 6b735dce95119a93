"""Speed, side by side with what could be used instead, in one interleaved run. Not in the package."""
