"""Data only: one YAML file an entry, read by `ftplan.profiles`."""
