"""The front door: a version and a place for each request."""
