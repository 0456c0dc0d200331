"""Run the jobs of a sweep, each in a process of its own, on slots that share nothing."""
