"""The parts of `toca eval`: settings, their samples and times, quality, the pictures of it."""
