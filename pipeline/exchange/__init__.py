"""Labels for other trainers, and labels of other formats."""
