"""The parts of `toca tune`: costs, sensitivity, schedules, the search among them, the report."""
