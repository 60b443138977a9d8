"""Original images: the three layouts of a source (image folder, tars, Parquet), its samples, and decoders."""
