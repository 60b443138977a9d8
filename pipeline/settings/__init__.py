"""Settings: config dataclasses, their command-line options, YAML files."""
