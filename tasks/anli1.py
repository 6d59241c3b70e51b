"""Registers the SeqIO tasks and mixtures of ANLI, round 1, on import."""

from dss.data.datasets import Dataset
from dss.integrations.seqio_tasks import register_seqio

__all__ = ["NAMES"]

NAMES = register_seqio(Dataset.released("anli1"))
