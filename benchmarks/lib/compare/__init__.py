"""Training with and without clipping: a grid of runs, their rows, and what these show."""
