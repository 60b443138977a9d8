"""Label sets between places and people: push, pull, merge, sign."""
