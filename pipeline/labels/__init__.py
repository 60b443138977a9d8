"""The label set: its files and identity, the manifest that commits these files, and `LabelSet`, which reads them."""
