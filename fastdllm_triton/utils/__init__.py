"""What has nothing to do with models: checks of arguments, environment variables, files."""
