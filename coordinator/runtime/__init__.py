"""Plan in, answer out: worker processes, steps and text."""
