"""Several models and transforms behind one request."""
