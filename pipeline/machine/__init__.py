"""The machine: loader processes, shares of the work, progress, times."""
