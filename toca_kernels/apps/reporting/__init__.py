"""The parts of `toca report`: the page of a trace, with charts, pictures and its script."""
