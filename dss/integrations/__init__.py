"""dss inside SeqIO, TensorFlow Datasets and T5X."""
