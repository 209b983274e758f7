"""The parts of `toca sample`: the files of a run, its batches, its processes."""
