"""Byte-level BPE: exact size, lossless, and text that never becomes a special token."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
import tokenizers

from qkjax import errors
from qkjax.data import tokenizer as tokenizer_lib

BYTE_LEVEL = ("add_prefix_space", "trim_offsets", "use_regex")
AWKWARD = [
    "plain words, and more of them",
    " leading, trailing and   several  spaces \n\n\t\r\n",
    "Ünïcödé, e\u0301 against \u00e9, 中文字, עברית, 👩‍👩‍👧",
    "\U0001f600 \u202e \ufeff \ufffd \U0010ffff",
    "controls \x00\x01\x07\x1b\x7f\x85 and \u2028 separators",
    "<|endoftext|> </s> <eos> <pad> <|im_start|> [UNK] <0x0A> Ġ Ċ ▁",
    "x" * 20_000,
    "no spaces " + "".join(chr(0x4E00 + i % 5000) for i in range(5_000)),
    "0123456789 3.14159 1e-08 don't I'll",
]


def _texts():
    random_words = random.Random(0)
    words = ["".join(random_words.choices("abcdefgh", k=5)) for _ in range(500)]
    return [" ".join(random_words.choices(words, k=40)) for _ in range(300)]


@pytest.fixture(scope="module")
def trained():
    return tokenizer_lib.train(_texts(), 400)


@pytest.fixture(scope="module")
def smollm2(shared):
    return tokenizer_lib.load(shared / "data" / "tokenizer_smollm2" / "tokenizer.json")


@pytest.mark.parametrize("which", ["trained", "smollm2"])
def test_text_survives_and_is_never_special(which, request):
    tokenizer = request.getfixturevalue(which)
    texts = [*AWKWARD, tokenizer.eos_token, f"a{tokenizer.eos_token}{tokenizer.eos_token} b"]
    ids = tokenizer.encode_batch(texts)
    assert tokenizer.decode_batch(ids) == texts
    assert [tokenizer.decode(one) for one in ids] == texts
    for one in ids:
        assert one.dtype == "uint32" and one.ndim == 1
        assert int(one.max()) < tokenizer.vocab_size
        assert tokenizer.eos_id not in one
    assert tokenizer.decode([tokenizer.eos_id]) == tokenizer.eos_token


def test_the_smollm2_tokenizer_is_read_as_published(smollm2, shared):
    assert (smollm2.vocab_size, smollm2.eos_id, smollm2.eos_token) == (49152, 0, "<|endoftext|>")
    path = shared / "data" / "tokenizer_smollm2" / "tokenizer.json"
    text = "The quick brown fox, 1984."
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    assert smollm2.encode_batch([text])[0].tolist() == expected
    assert smollm2.content == path.read_bytes()


def test_the_vocabulary_has_exactly_the_size_that_was_asked_for(trained):
    assert (trained.vocab_size, trained.eos_id, trained.eos_token) == (400, 0, "<|endoftext|>")
    vocabulary = json.loads(trained.content)["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(400))
    # It has learnt something: fewer tokens than bytes.
    text = _texts()[0]
    assert len(trained.encode_batch([text])[0]) < 0.7 * len(text)


def test_a_smallest_vocabulary_is_bytes_and_end_of_text():
    tokenizer = tokenizer_lib.train([], 257)
    ids = tokenizer.encode_batch(["é!"])[0]
    assert len(ids) == 3 and tokenizer.decode(ids) == "é!"


@pytest.mark.parametrize(
    ("size", "message"),
    [(256, "expected at least 257"), (50_000, r"give only \d+ tokens, expected 50000")],
)
def test_an_impossible_size_is_refused_with_both_numbers(size, message):
    with pytest.raises(errors.UsageError, match=f"train:{size}: .*{message}"):
        tokenizer_lib.train(_texts(), size)


TRAIN_AGAIN = """
import hashlib, random
import test_tokenizer
from qkjax.data import tokenizer
print(hashlib.sha256(tokenizer.train(test_tokenizer._texts(), 400).content).hexdigest())
"""


@pytest.mark.process
def test_training_gives_the_same_bytes_in_any_process_and_number_of_threads(trained):
    found = set()
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_AGAIN],
            env={
                **os.environ,
                "RAYON_NUM_THREADS": threads,
                "PYTHONPATH": os.path.dirname(__file__),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert found == {hashlib.sha256(trained.content).hexdigest()}


def _variant(trained, edit):
    content = json.loads(trained.content)
    edit(content)
    return json.dumps(content).encode()


def _rename_eos(name, special=True):
    def edit(content):
        content["added_tokens"][0] |= {"content": name, "special": special}
        vocabulary = content["model"]["vocab"]
        vocabulary[name] = vocabulary.pop("<|endoftext|>")

    return edit


@pytest.mark.parametrize("name", ["</s>", "<eos>"])
def test_end_of_text_goes_by_its_usual_names(trained, name):
    tokenizer = tokenizer_lib.Tokenizer(_variant(trained, _rename_eos(name)))
    assert (tokenizer.eos_token, tokenizer.eos_id) == (name, 0)


def test_another_end_of_text_has_to_be_named(trained):
    content = _variant(trained, _rename_eos("<stop>"))
    with pytest.raises(errors.UsageError, match=r"no end-of-text token.*--eos_token"):
        tokenizer_lib.Tokenizer(content)
    assert tokenizer_lib.Tokenizer(content, eos_token="<stop>").eos_id == 0
    with pytest.raises(errors.UsageError, match="expected '<halt>'"):
        tokenizer_lib.Tokenizer(content, eos_token="<halt>")


@pytest.mark.parametrize("name", ["<|endoftext|>", "stop"])
def test_an_end_of_text_that_the_file_does_not_mark_special_is_safe_too(trained, name):
    content = _variant(trained, _rename_eos(name, special=False))
    tokenizer = tokenizer_lib.Tokenizer(content, eos_token=name)
    text = f"please {name} here, {name}"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text


def test_nothing_is_added_padded_or_cut(trained):
    backend = tokenizers.Tokenizer.from_str(trained.content.decode())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = tokenizer_lib.Tokenizer(backend.to_str().encode())
    text = _texts()[0]
    assert tokenizer.encode_batch([text])[0].tolist() == trained.encode_batch([text])[0].tolist()


def _add_tokens(content, *names, special):
    vocabulary = content["model"]["vocab"]
    for name in names:
        number = len(vocabulary)
        vocabulary[name] = number
        if special:
            token = dict(content["added_tokens"][0], id=number, content=name)
            content["added_tokens"].append(token)


def test_end_of_text_is_what_the_file_declares_special(trained):
    def plain_first(content):
        _rename_eos("<eos>")(content)
        _add_tokens(content, "</s>", "<|endoftext|>", special=False)

    assert tokenizer_lib.Tokenizer(_variant(trained, plain_first)).eos_token == "<eos>"


@pytest.mark.parametrize("special", [True, False])
def test_two_tokens_that_may_end_a_text_are_refused(trained, special):
    def two(content):
        _rename_eos("<eos>", special=special)(content)
        _add_tokens(content, "</s>", special=special)
        content["added_tokens"] = content["added_tokens"] if special else []

    content = _variant(trained, two)
    with pytest.raises(errors.UsageError, match=r"</s> and <eos> may each be .*--eos_token"):
        tokenizer_lib.Tokenizer(content)
    assert tokenizer_lib.Tokenizer(content, eos_token="</s>").eos_token == "</s>"


def test_a_text_that_does_not_come_back_has_no_tokens(trained):
    def marks_spaces(content):
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "_"}, "content": "▁"}
        content["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteLevel", **{key: True for key in BYTE_LEVEL}},
                {"type": "Replace", "pattern": {"String": "▁"}, "content": "_"},
            ],
        }

    tokenizer = tokenizer_lib.Tokenizer(_variant(trained, marks_spaces))
    first, second, third = tokenizer.encode_exactly(["a_b", "a ▁ b", ""])
    assert tokenizer.decode(first) == "a_b" and second is None and third.tolist() == []


def test_one_space_at_the_beginning_is_no_difference(trained):
    def prefix(content):
        content["pre_tokenizer"] = {"type": "ByteLevel", **{key: True for key in BYTE_LEVEL}}

    tokenizer = tokenizer_lib.Tokenizer(_variant(trained, prefix))
    ids = tokenizer.encode_exactly(["word"])[0]
    assert tokenizer.decode(ids) == " word"


@pytest.mark.parametrize(
    "run", ["".join("abcdefghij"[i * i % 10] for i in range(10)), " ", "-=", "é"]
)
def test_training_on_one_endless_word_is_bounded(trained, run):
    """Uncut, its time grows with the square of the letters in a row."""
    text = _texts()[0] + run * (1_000_000 // len(run))
    pieces = list(tokenizer_lib._in_bounded_runs([text]))
    assert "".join(pieces) == text and len(pieces) > 1_000
    tokenizer = tokenizer_lib.train([*_texts(), text], 400)
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_ordinary_text_is_trained_on_as_it_is():
    texts = [*_texts(), *AWKWARD[:6]]
    assert list(tokenizer_lib._in_bounded_runs(texts)) == texts


def test_for_other_programs_nothing_is_added_to_a_text(trained):
    assert tokenizer_lib.without_additions(trained.content) == trained.content
    backend = tokenizers.Tokenizer.from_str(trained.content.decode())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    special = [("<|endoftext|>", 0)]
    template = tokenizers.processors.TemplateProcessing
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    for single in ("$A <|endoftext|>", "<|endoftext|> $A"):
        adds = template(single=single, special_tokens=special)
        for processor in (adds, tokenizers.processors.Sequence([byte_level, adds])):
            backend.post_processor = processor
            content = tokenizer_lib.without_additions(backend.to_str().encode())
            plain = tokenizers.Tokenizer.from_str(content.decode())
            text = _texts()[0]
            assert plain.encode(text).ids == trained.encode_batch([text])[0].tolist()
            assert ("ByteLevel" in str(plain.post_processor)) == (processor is not adds)


def _replace_letter(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "i"}, "content": "j"}


def _lower_case(content):
    content["normalizer"] = {"type": "Lowercase"}


def _drop_newlines(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}


def _plain_words(content):
    content["model"] = {
        "type": "WordLevel",
        "vocab": {"<|endoftext|>": 0, "[UNK]": 1},
        "unk_token": "[UNK]",
    }
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    content["added_tokens"] = []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_replace_letter, r"loses text, 'Two Lines.* comes back as 'Two Ljnes"),
        (_lower_case, r"loses text, 'Two Lines.* comes back as 'two lines"),
        (_drop_newlines, r"loses text, .* comes back as 'o Lines\.  \\tInd"),
        (_plain_words, "becomes the special token 0"),
    ],
)
def test_a_tokenizer_that_would_break_the_proof_of_the_holdout_is_refused(trained, edit, message):
    with pytest.raises(errors.UsageError, match=message):
        tokenizer_lib.Tokenizer(_variant(trained, edit))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(errors.UsageError, match=r"not a tokenizer\.json") as caught:
        tokenizer_lib.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_of_tokenizers(tmp_path):
    assert tokenizer_lib.trained_size("train:4096") == 4096
    assert tokenizer_lib.trained_size(str(tmp_path / "a:b.json")) is None
    assert tokenizer_lib.trained_size("tokenizer.json") is None
    for spec in ("hub:SmolLM2", "train", "train:", "train:4k", "train:-5", ""):
        with pytest.raises(errors.UsageError):
            if tokenizer_lib.trained_size(spec) is None:
                tokenizer_lib.load(spec)
