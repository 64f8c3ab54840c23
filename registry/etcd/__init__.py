"""The only folder that speaks to etcd."""

from registry.etcd.client import EtcdStore
from registry.etcd.settings import BadEndpoint, EtcdSettings

__all__ = ["BadEndpoint", "EtcdSettings", "EtcdStore"]
