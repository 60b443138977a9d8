"""Studies: grids of trainings, each step a command of its own, that can be stopped and continued."""
