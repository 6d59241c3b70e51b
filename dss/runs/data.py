"""The data of a run: token stores, the order of sequences, and batches."""

from dss.batches.batches import Batches
from dss.batches.order import Order, paired_order, sampled_order
from dss.batches.store import TokenStore, open_store
from dss.config.data import open_mixture
from dss.config.experiment import Experiment
from dss.data.vocabulary import Vocabulary, load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import Mixture
from dss.student.config import T5Config

__all__ = [
    "split_store",
    "start_ids",
    "training_batches",
    "training_order",
    "training_store",
]


def split_store(
    experiment: Experiment, mixture: Mixture, split: str, vocabulary: Vocabulary
) -> TokenStore:
    """Returns the token store of a split, with the options of an experiment."""
    data = experiment.data
    return open_store(
        mixture,
        split,
        vocabulary,
        inputs_length=data.inputs_length,
        targets_length=data.targets_length,
        fraction=data.fraction,
        seed=experiment.seed,
        keep_unparsed=data.keep_unparsed,
        rationales=experiment.rationales,
    )


def training_store(experiment: Experiment) -> TokenStore:
    """Returns the token store of an experiment's training split."""
    assert experiment.vocabulary is not None
    vocabulary = load_vocabulary(experiment.vocabulary)
    return split_store(experiment, open_mixture(experiment), "train", vocabulary)


def training_order(experiment: Experiment, store: TokenStore, rates: tuple[float, ...]) -> Order:
    """Returns the order of an experiment's training sequences."""
    if experiment.data.batches == "paired":
        return paired_order(store, experiment.batch_size, experiment.seed)
    return sampled_order(store, experiment.batch_size, experiment.seed, rates)


def training_batches(
    experiment: Experiment,
    mixture: Mixture,
    store: TokenStore,
    groups: int,
    starts: tuple[int, ...] | None = None,
) -> Batches:
    """Returns the training batches of an experiment.

    Args:
      experiment: the experiment.
      mixture: the mixture to train on.
      store: the token store of the training split.
      groups: the number of groups of a batch (data shards x microbatches).
      starts: the decoder's start id of each task, from `start_ids`.
    """
    return Batches(
        store,
        training_order(experiment, store, mixture.rates),
        num_steps=experiment.trainer.train_steps,
        packed=experiment.data.packed,
        groups=groups,
        starts=starts,
    )


def start_ids(mixture: Mixture, vocabulary: Vocabulary, config: T5Config) -> tuple[int, ...] | None:
    """Returns the decoder's start id of each task; None if all tasks use T5's start id.

    Args:
      mixture: the mixture of the tasks.
      vocabulary: the vocabulary; start ids are past its end.
      config: the student's configuration.

    Raises:
      DssError: if the student has too few embeddings.
    """
    starts = mixture.start_ids(vocabulary)
    if starts is not None and max(starts) >= config.vocab_size:
        raise DssError(
            f"DataConfig.one_encoder_pass: {mixture.tasks[-1].name} starts from the id "
            f"{max(starts)} past the vocabulary, and the student has {config.vocab_size} "
            "embeddings; raise T5Config.vocab_size, or train without one_encoder_pass"
        )
    return starts
