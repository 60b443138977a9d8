"""Files on this machine and behind URLs: atomic writes, strict JSON and YAML, transfers, a disk cache, a mirror."""
