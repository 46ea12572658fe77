"""What a running worker answers over HTTP: whether it lives, and whether it is ready."""
