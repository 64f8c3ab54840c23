"""The product: command line, wiring, embedded etcd and bench."""

__version__ = "0.1.0"
