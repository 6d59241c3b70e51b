import pytest

from dss.data.datasets import Dataset
from dss.data.vocabulary import encode_example, load_vocabulary
from dss.errors import DssError


def test_ids_are_those_of_transformers_on_real_inputs(vocab_path, data_root, tmp_path):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(vocab_path.read_bytes())
    theirs = T5Tokenizer.from_pretrained(tmp_path)
    ours = load_vocabulary(vocab_path)
    for name in ("cqa", "svamp", "anli1", "esnli"):
        for example in Dataset.released(name).examples("test")[:150]:
            text = f"predict: {example.input}"
            assert encode_example(ours, text, 1024) == theirs(text).input_ids, text


def test_eos_in_a_text_is_one_id_and_long_texts_end_with_eos(vocab_path):
    vocabulary = load_vocabulary(vocab_path)
    ids = vocabulary.encode("a premise</s>a hypothesis")
    assert ids.count(1) == 1
    truncated = encode_example(vocabulary, "word " * 50, 8)
    assert len(truncated) == 8
    assert truncated[-1] == 1


def test_decoding_ends_at_eos_and_skips_special_ids(vocab_path):
    vocabulary = load_vocabulary(vocab_path)
    ids = vocabulary.encode("wooded area")
    assert vocabulary.decode([*ids, 32099, 0, 1, *ids]) == "wooded area"


def test_a_missing_or_invalid_vocabulary_is_an_error(tmp_path):
    with pytest.raises(DssError, match="no such vocabulary file"):
        load_vocabulary(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(DssError, match="not a SentencePiece model"):
        load_vocabulary(tmp_path / "text.model")


def test_a_sentencepiece_model_with_other_special_ids_is_the_wrong_vocabulary(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three"] * 5),
        model_prefix=str(tmp_path / "other"),
        model_type="word",
        vocab_size=6,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DssError, match="wrong vocabulary"):
        load_vocabulary(tmp_path / "other.model")
