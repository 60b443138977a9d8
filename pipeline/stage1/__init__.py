"""Stage 1: render the views of a source, label them with a teacher, and seal the label set."""
