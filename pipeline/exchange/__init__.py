"""Exchange with other projects: export labels for other trainers, import labels of other formats."""
