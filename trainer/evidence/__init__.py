"""Evidence: what a label set, a student and a study show, as tables, pictures and reports."""
