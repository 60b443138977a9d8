"""Settings: config dataclasses, the command-line options made from them, and YAML files."""
