"""13-grams: found by brute force too, counted per document, and their documents dropped."""

import dataclasses
import io
import itertools
import json
import string

import numpy as np
import pytest

from qkjax import errors, files
from qkjax.data import check, holdout, overlap, prepare

TEXTS = [
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    "too short",
    "",
    "Don't -- stop: one two three four FIVE six seven, eight nine ten eleven (twelve) thirteen.",
    "über naïve été " * 6 + "x\x00y",
    " - ! ? " * 20,
    "a b " * 20,
]


def _words(text):
    kept = "".join(c for c in holdout.normalise(text) if c not in string.punctuation)
    return [word for word in "".join(c if c > " " else " " for c in kept).split(" ") if word]


def _grams(text):
    words = _words(text)
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def test_every_ngram_has_its_own_hash_and_its_text(shared):
    import lzma

    with lzma.open(shared / "data" / "edu_openstax.train.jsonl.xz", "rt") as file:
        real = [json.loads(line)["text"] for line in itertools.islice(file, 20)]
    texts = [*TEXTS, *real]
    found = overlap.ngrams([holdout.normalise(text) for text in texts])
    expected = [(i, gram) for i, text in enumerate(texts) for gram in _grams(text)]
    assert found.texts.tolist() == [i for i, _ in expected]
    by_gram = {}
    for (_, gram), value in zip(expected, found.hashes.tolist(), strict=True):
        assert by_gram.setdefault(gram, value) == value
    assert len(set(by_gram.values())) == len(by_gram) > 10_000


def test_the_hash_of_a_gram_depends_on_every_word_and_its_place():
    words = [f"w{i}" for i in range(13)]
    variants = [" ".join(words)]
    variants += [" ".join([*words[:i], "other", *words[i + 1 :]]) for i in range(13)]
    variants += [" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in range(12)]
    variants += ["w0w1 " + " ".join(words[2:]) + " w13", " ".join(["w", "0w1", *words[2:]])]
    assert len(set(overlap.ngrams(variants).hashes.tolist())) == len(variants)
    assert overlap.ngrams([" ".join(words[:12])]).hashes.size == 0
    assert overlap.ngrams([" ".join(words[:6]), " ".join(words[6:])]).hashes.size == 0
    # Frozen: the counts of two datasets can be compared only as long as the hash stays.
    assert overlap.ngrams(variants[:1]).hashes.tolist() == [14898236251082173978]


def test_an_index_counts_each_name_for_itself(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 99, 40)) for _ in range(50)]
    hashes = overlap.ngrams(texts).hashes
    overlap.build({"validation": hashes[:100], "lambada": hashes[50:60]}, tmp_path)
    index = overlap.load(tmp_path)
    assert index.num_ngrams() == {"validation": 100, "hellaswag": 0, "lambada": 10}
    counts = index.count([*texts, "", "nothing of that"])
    assert counts.sum(0).tolist() == [100, 0, 10]
    assert counts[:4].tolist() == [[28, 0, 0], [28, 0, 6], [28, 0, 4], [16, 0, 0]]
    empty = tmp_path / "empty"
    empty.mkdir()
    overlap.build({"validation": hashes[:0]}, empty)
    assert not overlap.load(empty).count(texts).any()


def test_benchmarks_are_found_by_name_and_read_item_by_item(tmp_path, shared):
    files = overlap.benchmark_files(shared / "data")
    assert [path.name for path in files["lambada"]] == ["lambada_test.jsonl"]
    assert len(files["hellaswag"]) == 3
    text = " ".join(f"w{i}" for i in range(12))
    item = {"ctx": text, "endings": ["first end.", "second end."]}
    path = tmp_path / "deep" / "hellaswag_x.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(item) + "\n")
    found = overlap.benchmark_ngrams(overlap.benchmark_files(tmp_path)["hellaswag"])
    wanted = overlap.ngrams([f"{text} first end", f"{text} second end"]).hashes
    assert found.tolist() == sorted(wanted.tolist()) and len(found) == 4
    wrong = [{"ctx": 3}, {"text": 3}, {"ctx": 3, "endings": ["a"]}, {**item, "endings": "abcd"}, 3]
    for line in ("[" * 100_000, "{", *map(json.dumps, wrong)):
        path.write_text(f"{json.dumps(item)}\n{line}\n")
        with pytest.raises(errors.UsageError, match=rf"^{path}:2: expected a JSON object with tex"):
            overlap.benchmark_ngrams([path])
    with pytest.raises(errors.UsageError, match=r"--benchmark_dir=.*no hellaswag\*\.jsonl or"):
        overlap.benchmark_files(tmp_path / "nowhere")


@pytest.mark.parametrize("name", overlap.FILES.values())
@pytest.mark.parametrize("damage", ["cut", "empty", "object", "archive", "pickle", "gone"])
def test_a_damaged_index_is_one_line(tmp_path, name, damage):
    overlap.build({"validation": np.arange(20, dtype=np.uint64)}, tmp_path)
    path = tmp_path / name
    archive, pickled = io.BytesIO(), io.BytesIO()
    np.savez(archive, np.zeros(2))
    np.save(pickled, np.array([{}]), allow_pickle=True)
    contents = {"cut": path.read_bytes()[:-1], "empty": b"", "object": b"{}"}
    contents |= {"archive": archive.getvalue(), "pickle": pickled.getvalue()}
    path.write_bytes(contents.get(damage, b""))
    if damage == "gone":
        path.unlink()
    how = "missing" if damage == "gone" else r"damaged \(.*\)"
    with pytest.raises(errors.UsageError, match=rf"^{path}: {how}\. Remove {tmp_path} and run"):
        overlap.load(tmp_path)


def _corpus(folder, extra):
    rng = np.random.default_rng(1)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 500, 30)) for _ in range(400)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *extra]))
    held_out = [t for t in texts if holdout.in_pool(holdout.hash64(holdout.normalise(t)))]
    return path, held_out


def test_overlaps_are_counted_and_dropped_on_request(tmp_path):
    _, held_out = _corpus(tmp_path, [])
    quoted = held_out[0].split()
    sentence = [f"story{i}" for i in range(20)]
    extra = [
        "a quotation " + " ".join(quoted[3:17]) + " and on",  # two 13-grams of validation
        "not enough " + " ".join(quoted[3:15]) + " and on",
        "Story0, " + " ".join(sentence[1:14]).upper() + "!",  # two of lambada
    ]
    assert not any(holdout.in_pool(holdout.hash64(holdout.normalise(text))) for text in extra)
    path, _ = _corpus(tmp_path, extra)
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "lambada.jsonl").write_text(json.dumps({"text": " ".join(sentence)}) + "\n")
    request = prepare.Request(
        sources=(f"jsonl:{path}",), tokenizer="train:270", sequence_length=16, validation_tokens=600
    )

    def made(name, **changes):
        changed = dataclasses.replace(request, **changes)
        manifest = prepare.prepare(changed, tmp_path / name, progress=lambda line: None)
        check.check(tmp_path / name, progress=lambda line: None)
        return manifest

    plain = made("plain")
    counts = plain.overlap["validation"]
    assert (counts["training_documents"], counts["training_ngrams"]) == (1, 2)
    assert plain.overlap["lambada"] is None and plain.overlap["hellaswag"] is None
    assert plain.overlap["ngram_words"] == 13 and plain.dropped["overlapping"] == 0
    measured = made("measured", benchmark_dir=str(benchmarks))
    assert measured.overlap["lambada"] == {
        "files": ["lambada.jsonl"],
        "sha256": [files.sha256(benchmarks / "lambada.jsonl")],
        "ngrams": 8,
        "training_documents": 1,
        "training_ngrams": 2,
    }
    assert measured.fingerprint == plain.fingerprint
    clean = made("clean", benchmark_dir=str(benchmarks), decontaminate=True)
    assert clean.dropped["overlapping"] == 2 and clean.overlap["documents_dropped"]
    assert clean.sources[0]["documents"] == plain.sources[0]["documents"] - 2
    assert clean.overlap["lambada"] == measured.overlap["lambada"]
    only = made("only validation", decontaminate=True)
    assert only.dropped["overlapping"] == 1
