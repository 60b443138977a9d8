"""Images in: samples, the three layouts of a source, decoders."""
