"""What is timed and how: shapes, the ops on them and their work, clocks, a model's calls."""
