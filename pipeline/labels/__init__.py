"""The label set: its files and identity, the manifest that commits them, and `LabelSet`, which reads them."""
