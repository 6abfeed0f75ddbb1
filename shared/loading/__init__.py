"""From settings and folders to a ready engine: models and drafts by name, costs from files."""
