"""Generated from ``registry/etcd/proto/etcd.proto``; how: the README beside it."""
