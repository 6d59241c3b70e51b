"""e-SNLI: importing this registers its SeqIO tasks and mixtures."""

from dss.data.datasets import Dataset
from dss.integrations.seqio_tasks import register_seqio

__all__ = ["NAMES"]

NAMES = register_seqio(Dataset.released("esnli"))
