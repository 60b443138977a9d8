"""Stage 1: from a plan to sealed labels."""
