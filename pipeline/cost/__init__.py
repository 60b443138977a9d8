"""The cost of labelling: rates measured on this machine, and estimates for a whole source."""
