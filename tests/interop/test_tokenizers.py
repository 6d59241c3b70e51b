"""A `tokenizer.json` alone is read: its ids are those of the SentencePiece model it was made of."""

import json
import shutil

import pytest

from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.errors import CheckpointError
from dss.interop.huggingface import find_vocabulary
from dss.interop.tokenizers import sentencepiece_model

ODD = [
    "  two  spaces\tand a tab\nand a line ",
    "",
    "</s>",
    "premise</s>hypothesis",
    "ﬁ ½ m² \uff21 { } < é é 你好 🙂 \u200b x",
    "<pad> is text here",
    "-- ... a.b,c 1,234.50",
]


@pytest.fixture(scope="module")
def saved(vocab_path, tmp_path_factory):
    """A folder with what transformers saves of T5's tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(vocab_path, folder / "spiece.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 32128}))
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    out = folder / "saved"
    tokenizer.save_pretrained(out)
    shutil.copy(folder / "config.json", out)
    (out / "spiece.model").unlink(missing_ok=True)
    return out


def test_ids_and_texts_are_those_of_the_sentencepiece_model(saved, vocab_path, shared):
    path = find_vocabulary(saved)
    assert path == find_vocabulary(saved), "made once"
    ours, wanted = load_vocabulary(path), load_vocabulary(vocab_path)
    assert ours.size == wanted.size
    root = shared / "data" / "datasets"
    texts = [
        e.input for name in ("cqa", "svamp") for e in Dataset.released(name, root).examples("test")
    ]
    for text in [*texts, *ODD]:
        ids = wanted.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == wanted.decode(ids), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "BPE"}}, "a tokenizer of type 'BPE'; supported is Unigram"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "not T5's normalization"),
        ({"normalizer": {"type": "Lowercase"}}, r"not T5's normalization \(Lowercase\)"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}},
            "'precompiled_charsmap' is not base64",
        ),
        ({"added_tokens": [{"content": "<billing>"}]}, "added tokens '<billing>', which"),
        ({"model": {"type": "Unigram", "vocab": [["<s>", 0]]}}, "its first pieces are <s>; T5's"),
        (
            {"model": {"type": "Unigram", "vocab": [1]}},
            "'vocab' is not a list of pieces",
        ),
        ([], "a tokenizer of type None"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_by_name(change, message, tmp_path):
    vocab = [[piece, 0.0] for piece in ("<pad>", "</s>", "<unk>", "▁a", "<extra_id_0>")]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    content = {"model": {"type": "Unigram", "vocab": vocab}, "pre_tokenizer": metaspace}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content | change if isinstance(change, dict) else change))
    with pytest.raises(CheckpointError, match=message):
        sentencepiece_model(file)


def test_byte_pieces_are_decoded_as_bytes(tmp_path):
    """As in umT5's vocabulary, where no text is unknown."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a"]
    vocab = [[piece, -float(i)] for i, piece in enumerate(pieces)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    model = {"type": "Unigram", "vocab": vocab, "byte_fallback": True}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": model, "pre_tokenizer": metaspace}))
    (tmp_path / "made.model").write_bytes(sentencepiece_model(file))
    vocabulary = load_vocabulary(tmp_path / "made.model")
    ids = vocabulary.encode("a é")
    assert 2 not in ids
    assert vocabulary.decode(ids) == "a é"
