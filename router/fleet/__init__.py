"""The fleet behind a gateway as values, and how one node of it is chosen."""
