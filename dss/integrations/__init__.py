"""Plug-ins for SeqIO, TensorFlow Datasets and T5X.

The only package of dss that imports TensorFlow; it needs the extra `seqio` or `tfds`.
"""
