"""What should run, and who is alive: documents, keys, and the one folder that speaks etcd."""
