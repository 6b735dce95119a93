"""Speed, side by side with what could be used instead. No part of the package."""
