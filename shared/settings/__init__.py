"""The typed settings tree, read from one YAML file."""
