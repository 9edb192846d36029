"""Indexing on a cluster of Ray."""

from upperson_ray.index import ShardsDone, index_on_ray

__all__ = ["ShardsDone", "index_on_ray"]
