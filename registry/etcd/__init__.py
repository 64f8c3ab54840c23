"""The only folder that speaks to etcd."""

import os

# Before gRPC is imported: its handlers around fork() crash children that only want to exec, one
# in six with ``preexec_fn`` and one in ten under uvloop (decision 0004). Nobody here uses gRPC in
# a forked child, which is what they are for.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from registry.etcd.client import EtcdStore
from registry.etcd.settings import BadEndpoint, EtcdSettings

__all__ = ["BadEndpoint", "EtcdSettings", "EtcdStore"]
