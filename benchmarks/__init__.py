"""Speed, compared with what could be used instead. Not part of the package."""
