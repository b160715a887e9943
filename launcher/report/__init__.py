"""The report of a run: one page, and the pictures of loss and memory. Made from the run directory
alone; needs no torch."""
