"""The label set: its files, their identity, the manifest that commits them, and how it is read."""
