"""The coordinator of rollouts: one of the nodes, elected, decides when a document takes effect."""
