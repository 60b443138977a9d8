"""Bytes here and behind URLs: atomic files, strict JSON and YAML, transfers, a disk cache, a mirror."""
