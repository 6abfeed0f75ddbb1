"""From settings and folders to a ready engine: models by name, drafts found and checked, measured costs read or written."""
