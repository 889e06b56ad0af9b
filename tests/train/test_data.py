import json
import math

import datasets
import pytest
import torch

from shaped_attn.train import corpus as corpora
from shaped_attn.train import data, extra
from shaped_attn.train.corpus import Corpus, as_bytes, bigram_entropy, unigram_entropy

EVERYTHING = 10**9


def text_of(part):
    return bytes(part.tolist()).decode()


def make_corpus(train, validation):
    return Corpus(as_bytes(train), as_bytes(validation), (), (), "")


@pytest.fixture(scope="module")
def library():
    return data.load_standard_library(max_bytes=200_000)


@pytest.fixture
def folder(tmp_path):
    """A folder of 60 text files, each of one word."""
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(60):
        (root / f"text_{i}.txt").write_text(f"word{i}")
    return root


# ---------------------------------------------------------------------------- the standard library


def test_the_split_is_by_file_and_the_same_every_time(library):
    again = data.load_corpus("stdlib", 200_000)
    assert torch.equal(library.train, again.train)
    assert torch.equal(library.validation, again.validation)
    assert library.digest() == again.digest()
    assert not set(library.train_files) & set(library.validation_files)
    assert library.validation.numel() == pytest.approx(20_000, rel=0.1)
    assert library.train.numel() == pytest.approx(180_000, rel=0.1)
    first = data.standard_library() / library.train_files[0]
    content = first.read_bytes()[:1000]
    assert bytes(library.train[: len(content)].tolist()) == content


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_text(f"x = {i}\n")
    before = data.load_standard_library(tmp_path)
    (tmp_path / "module_5.py").unlink()
    (tmp_path / "other.py").write_text("y = 1\n")
    after = data.load_standard_library(tmp_path)
    assert set(before.train_files) - set(after.train_files) <= {"module_5.py"}
    assert set(before.validation_files) - set(after.validation_files) <= {"module_5.py"}


def test_installed_packages_and_tests_are_not_the_library(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_text("x = 1\n")
    for name in ("site-packages", "test", "sqlite3/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "strange.py").write_text("y = 2\n")
    found = data.load_standard_library(tmp_path)
    names = found.train_files + found.validation_files
    assert len(names) == 60
    assert not any("strange" in name for name in names)


def test_no_source_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 training and 0 validation files.*as source"):
        data.load_standard_library(tmp_path)


# ------------------------------------------------------------------------------ files and folders


def test_of_a_file_the_last_tenth_validates(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)))
    found = data.load_corpus(str(path), EVERYTHING)
    assert found.train.tolist() == list(range(180))
    assert found.validation.tolist() == list(range(180, 200))
    found = data.load_corpus(str(path), 50)
    assert found.train.tolist() == list(range(45))
    assert found.validation.tolist() == list(range(45, 50))


def test_a_folder_is_split_by_file(folder):
    found = data.load_corpus(str(folder), EVERYTHING)
    words = [text_of(part).split("\n") for part in (found.train, found.validation)]
    assert sorted(words[0] + words[1]) == sorted(f"word{i}" for i in range(60))
    for part, names in zip(words, (found.train_files, found.validation_files), strict=True):
        assert part == [name.replace("text_", "word").removesuffix(".txt") for name in names]
    # Names of files, not their order on the disk, decide.
    assert len(words[1]) == sum(data._position(f"text_{i}.txt") < 0.1 for i in range(60)) > 0


def test_a_folder_is_read_for_its_text_alone(folder):
    plain = data.load_corpus(str(folder), EVERYTHING)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert data.load_corpus(str(folder), EVERYTHING).digest() == plain.digest()
    (folder / "below").mkdir()
    (folder / "below" / "more.txt").write_text("more")
    found = data.load_corpus(str(folder), EVERYTHING)
    assert "below/more.txt" in found.train_files + found.validation_files


def test_the_cap_leaves_the_proportions_alone(folder):
    for path in folder.iterdir():
        path.write_text("x" * 100)
    found = data.load_corpus(str(folder), 1000)
    assert (found.train != ord("\n")).sum() == 900
    assert (found.validation != ord("\n")).sum() == 100


def test_too_little_text_is_a_clear_error(tmp_path):
    (tmp_path / "one.txt").write_text("x" * 100)
    with pytest.raises(FileNotFoundError, match="1 text files.*or give one file"):
        data.load_corpus(str(tmp_path), EVERYTHING)
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(OSError, match="5 bytes, too few"):
        data.load_corpus(str(short), EVERYTHING)


def test_an_unknown_source_is_a_clear_error():
    with pytest.raises(
        ValueError, match="data must be a file or folder that exists.*'nowhere.txt'"
    ):
        data.load_corpus("nowhere.txt", EVERYTHING)


def test_the_digest_tells_texts_apart():
    digests = {
        make_corpus(train, validation).digest()
        for train, validation in ((b"ab", b"c"), (b"a", b"bc"), (b"ab", b"d"), (b"abc", b""))
    }
    assert len(digests) == 4


# --------------------------------------------------------------------------------------- datasets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Nothing is written to the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def documents(count, prefix):
    return datasets.Dataset.from_dict({"text": [f"{prefix}{i}" for i in range(count)]})


def test_a_dataset_with_a_validation_split(tmp_path, cache):
    splits = {"train": documents(30, "t"), "validation": documents(3, "v")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = data.load_corpus(str(tmp_path / "saved"), EVERYTHING)
    assert text_of(found.train).split("\n") == [f"t{i}" for i in range(30)]
    assert text_of(found.validation) == "v0\nv1\nv2"


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_dataset_without_one_gives_a_tenth_of_its_documents(as_dict, tmp_path, cache):
    dataset = documents(200, "t")
    if as_dict:
        dataset = datasets.DatasetDict({"train": dataset})
    dataset.save_to_disk(tmp_path / "saved")
    found = data.load_corpus(str(tmp_path / "saved"), EVERYTHING)
    parts = [text_of(part).split("\n") for part in (found.train, found.validation)]
    assert sorted(parts[0] + parts[1]) == sorted(f"t{i}" for i in range(200))
    assert len(parts[1]) == sum(data._position(str(i)) < 0.1 for i in range(200)) > 0


def test_a_dataset_by_name(tmp_path, cache):
    folder = tmp_path / "owner"
    folder.mkdir()
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        lines = [json.dumps({"body": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    found = data.load_corpus(f"hf:{folder}", EVERYTHING, "body")
    assert (text_of(found.train), text_of(found.validation)) == ("one\ntwo", "three")
    with pytest.raises(ValueError, match="text_column must be one of body, got 'text'"):
        data.load_corpus(f"hf:{folder}", EVERYTHING)


@pytest.mark.parametrize(
    ("source", "name", "config", "streaming"),
    [
        ("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1", False),
        ("c4", "allenai/c4", "en", True),
        ("hf:owner/name:part", "owner/name", "part", False),
        ("hf:owner/name", "owner/name", None, False),
    ],
)
def test_names_of_the_hub_are_passed_on(source, name, config, streaming, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        splits = {"train": documents(3, "t"), "validation": documents(2, "v")}
        if not streaming:
            return datasets.DatasetDict(splits)
        return datasets.IterableDatasetDict(
            {name: split.to_iterable_dataset() for name, split in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = data.load_corpus(source, EVERYTHING)
    assert asked == [((name, config), {"streaming": streaming})]
    assert (text_of(found.train), text_of(found.validation)) == ("t0\nt1\nt2", "v0\nv1")


def test_no_more_is_read_of_a_dataset_than_is_wanted(monkeypatch):
    read = {"train": 0, "validation": 0}

    def endless(split):
        while True:
            read[split] += 1
            yield {"text": "x" * 1000}

    def load_dataset(*args, **options):
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(
                    endless,
                    gen_kwargs={"split": split},
                    features=datasets.Features({"text": datasets.Value("string")}),
                )
                for split in read
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = data.load_corpus("c4", 20_000)
    assert (found.train != ord("\n")).sum() == 18_000
    assert (found.validation != ord("\n")).sum() == 2_000
    assert max(read.values()) <= 2 * data._BATCH


@pytest.mark.parametrize(
    ("splits", "error", "message"),
    [
        ({"test": ["a"]}, ValueError, 'must have a split named "train", got test'),
        ({"train": ["a"], "test": [""]}, OSError, "has no text for the validation part"),
        ({"train": [1]}, ValueError, "text_column must have text, got int"),
    ],
)
def test_datasets_that_cannot_be_used(splits, error, message, tmp_path, cache):
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    with pytest.raises(error, match=message):
        data.load_corpus(str(tmp_path / "saved"), EVERYTHING)


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (torch.tensor([5, 300]), TypeError, "from 0 to 255, got torch.int64 from 5 to 300"),
        (torch.tensor([-1, 5]), TypeError, "from 0 to 255, got torch.int64 from -1 to 5"),
        (torch.zeros(2, 3, dtype=torch.uint8), ValueError, r"got shape \(2, 3\)"),
        (b"text", TypeError, "got bytes"),
    ],
)
@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_token_outside_the_vocabulary_is_no_text(name, part, error, message):
    parts = {"train": as_bytes(b"abc"), "validation": as_bytes(b"abc"), name: part}
    with pytest.raises(error, match=f"{name} must be a .* of uint8.*{message}"):
        Corpus(**parts, train_files=(), validation_files=(), source="")


def test_a_missing_package_is_a_clear_error():
    with pytest.raises(ModuleNotFoundError, match=r'not_there.*pip install "shaped-attn\[train\]"'):
        extra.require("not_there")


# --------------------------------------------------------------------------- entropies and batches


def test_unigram_entropy_by_hand():
    # Training: 3 a, 1 b. With one more of each of the 256 bytes: 4/260 and 2/260, others 1/260.
    found = unigram_entropy(make_corpus(b"aaab", b"aabc"))
    expected = -(2 * math.log(4 / 260) + math.log(2 / 260) + math.log(1 / 260)) / 4
    assert found == pytest.approx(expected, rel=1e-12)


def test_entropies_of_text_that_is_known():
    # Two bytes, equally often, strictly in turn: one bit each, and nothing to a pair model.
    text = b"ab" * 5000
    smoothed = math.log((10_000 + 256) / 5001)
    assert unigram_entropy(make_corpus(text, text)) == pytest.approx(smoothed, rel=1e-12)
    assert bigram_entropy(make_corpus(text, text)) < 1e-3
    # What was never seen still has a probability.
    assert math.isfinite(unigram_entropy(make_corpus(text, b"zz")))
    assert math.isfinite(bigram_entropy(make_corpus(text, b"zz")))


def test_batches_are_text_and_follow_the_generator(library):
    draw = [
        corpora.sample_batch(library.train, 3, 50, corpora.step_generator(0, step))
        for step in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (3, 51)
    text = bytes(library.train.tolist())
    assert all(bytes(row.tolist()) in text for row in draw[0])
    with pytest.raises(ValueError, match="more than length \\+ 1 = 51 bytes, got 51"):
        corpora.sample_batch(library.train[:51], 1, 50, torch.Generator())


def test_batches_differ_between_seeds_and_steps():
    starts = {
        tuple(torch.randint(10**6, (4,), generator=corpora.step_generator(seed, step)).tolist())
        for seed in range(20)
        for step in range(20)
    }
    assert len(starts) == 400


def test_windows_cover_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    windows = corpora.fixed_windows(text, 4, 20)
    assert windows[:, 0].tolist() == [0, 59, 119, 179]
    assert windows[-1, -1] == 199
