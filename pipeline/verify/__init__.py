"""labels verify: every file, row, image and answer of a label set, checked."""
