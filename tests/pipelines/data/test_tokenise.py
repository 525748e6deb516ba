import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kforcing.loading import load_tokenizer
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.section import ConfigError
from pipelines.config.stages import corpus_spec
from pipelines.data.corpus import is_heldout
from pipelines.data.encoding import eos_id
from pipelines.data.listing import BUILTIN, CHAT
from pipelines.data.reading import document_id
from pipelines.data.rows import to_numpy
from pipelines.data.token_store import MANIFEST, TokenStore
from pipelines.data.tokenise import _names, listing_of, prepare


def test_the_split_is_a_function_of_the_id():
    docs = np.array([document_id(f"doc {i}") for i in range(20_000)])
    held = is_heldout(docs, 0.1)
    assert abs(held.mean() - 0.1) < 0.01
    assert (is_heldout(docs[::-1], 0.1)[::-1] == held).all()
    assert (is_heldout(docs, 0.2) >= held).all()


def name_of(tmp_path, *words):
    """The name of a new corpus."""
    spec = corpus_spec(apply(recipe("smoke"), {}, [f"output_dir={tmp_path}/run", *words]))
    return _names(spec, listing_of(spec))[-1]


def test_a_corpus_is_named_by_the_contents_of_its_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    first = name_of(tmp_path, f"data.source={file}")
    os.utime(file, (1, 1))
    shutil.copy(file, tmp_path / "b.txt")
    assert name_of(tmp_path, f"data.source={file}") == name_of(tmp_path, f"data.source={tmp_path}/b.txt") == first
    file.write_text("two\n")
    assert name_of(tmp_path, f"data.source={file}") != first
    file.write_text("one\n")
    assert name_of(tmp_path, f"data.source={file}", "data.special_tokens=true") != first
    assert name_of(tmp_path, f"data.source={file}", "data.special_tokens=false") == first
    assert name_of(tmp_path, f"data.source={file.rename(tmp_path / 'a.jsonl')}") != first


def test_the_special_tokens_of_a_corpus_are_part_of_its_name(tmp_path):
    path = f"data.source={BUILTIN[CHAT]}"  # a file given by its path is no chat unless one says so
    chat = name_of(tmp_path, f"data.source={CHAT}")
    assert name_of(tmp_path, path) != chat == name_of(tmp_path, path, "data.special_tokens=true")


def test_a_local_folder_of_datasets_is_named_by_its_contents(tmp_path):
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    file.write_bytes(b"one")
    first = name_of(tmp_path, f"data.source=hf:{file.parent}")
    file.write_bytes(b"two")
    assert name_of(tmp_path, f"data.source=hf:{file.parent}") != first


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json", "special_tokens_map.json"]
TOKENIZER_FILES += ["added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "spiece.model"]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_every_file_of_a_tokenizer_names_the_corpus(tmp_path, name):
    folder = tmp_path / "tokenizer"
    (folder / name).parent.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("one")
    first = name_of(tmp_path, f"tokenizer.path={folder}")
    (folder / "README.md").write_text("two")
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(folder / "tokenizer.json", (1, 1))
    assert (
        name_of(tmp_path, f"tokenizer.path={folder}") == name_of(tmp_path, f"tokenizer.path={tmp_path}/copy") == first
    )
    (folder / name).write_text("other")
    assert name_of(tmp_path, f"tokenizer.path={folder}") != first


def test_corpora_of_earlier_releases_are_looked_for_where_nothing_could_differ(tmp_path):
    def names(*words):
        spec = corpus_spec(apply(recipe("smoke"), {}, [f"output_dir={tmp_path}/run", *words]))
        return _names(spec, listing_of(spec))

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    tiny = ["data.max_docs=12", "data.docs_per_shard=4", "data.heldout_fraction=0.3", "tokenizer.vocab_size=260"]
    assert len(names(*tiny)) == 2
    assert names(*tiny)[0] == "60bc6653e1fbea1d"  # its folder in tests/data/finished_run.tar.gz
    assert len(names(f"data.source={tmp_path}/a.jsonl")) == len(names(f"tokenizer.path={tmp_path}")) == 1


TEXTS = [f"Document number {i} tells of {i % 7} things and of nothing else at all." for i in range(120)]


def write_corpus(folder, kind):
    """The same documents as text, JSON lines, Parquet or a `datasets` folder; returns data.source."""
    import datasets

    folder.mkdir(exist_ok=True)
    keys = [i if i != 7 else None for i in range(120)]
    table = datasets.Dataset.from_dict({"text": TEXTS, "name": [f"d{i}" for i in range(120)], "key": keys})
    if kind == "text":
        (folder / "corpus.txt").write_text("\n".join(TEXTS))
        return str(folder / "corpus.txt")
    if kind == "json":
        table.to_json(folder / "corpus.jsonl")
        return str(folder / "*.jsonl")
    if kind == "parquet":
        table.to_parquet(folder / "corpus.parquet")
        return str(folder)
    if kind == "saved":
        table.save_to_disk(folder / "saved")
        return f"hf:{folder / 'saved'}"
    table.to_parquet(folder / "train.parquet")
    return f"hf:{folder}"


def corpus_for(tmp_path, source, *words):
    fixed = [f"output_dir={tmp_path}/run", f"data.source={source}", "data.block=16", "data.max_docs=none"]
    return corpus_spec(apply(recipe("smoke"), {}, [*fixed, "data.docs_per_shard=16", *words]))


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["text", "json", "parquet", "hub", "saved"])
def test_every_source_gives_the_same_blocks(ray_here, tmp_path, kind):
    source = write_corpus(tmp_path / "corpus", kind)
    prepared = prepare(corpus_for(tmp_path, source))
    tokenizer = load_tokenizer(prepared.tokenizer)
    facts = prepared.facts()
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == 120
    assert 4 <= facts["heldout"]["documents"] <= 24
    store = TokenStore(prepared.split("train"), 0)
    tokens = to_numpy(store.read(np.arange(store.rows_per_epoch))["tokens"])
    assert tokens.shape[1] == 16
    assert tokens.max() < len(tokenizer)
    assert (tokens == eos_id(tokenizer)).sum() > 50
    docs = store.read(np.arange(store.rows_per_epoch))["doc"].to_numpy()
    assert not is_heldout(docs, 0.1).any()
    assert set(docs.tolist()) <= {document_id(text) for text in TEXTS}
    # A block is a stretch of the documents, each ended by EOS.
    inner = next(row for row in tokens if (row != eos_id(tokenizer)).all())
    assert any(tokenizer.decode(inner) in text for text in TEXTS)


@pytest.mark.cluster
def test_preparation_is_reused_until_its_inputs_change(ray_here, tmp_path, caplog):
    source = write_corpus(tmp_path / "corpus", "json")
    caplog.set_level("INFO", "kforcing")
    first = prepare(corpus_for(tmp_path, source))
    again = prepare(corpus_for(tmp_path, source, "train.lr=1"))
    assert again == first
    assert caplog.messages[-1].endswith("is up to date")
    assert prepare(corpus_for(tmp_path, source, "data.block=8")) != first
    assert prepare(corpus_for(tmp_path, source, "data.id_column=name")) != first


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.block=4096"], "not one block of 4096 tokens"),
        (["data.source=hf:/nowhere/at/all"], "`datasets` cannot load it"),
        (["data.text_column=body", "data.source=hf:{folder}"], "data.text_column=body is not in hf:"),
        (["data.id_column=key", "data.source=hf:{folder}"], r"hf:.*, row 7: no key; give every row one"),
    ],
)
def test_a_source_that_turns_out_unreadable_during_reading_gives_a_clear_error(ray_here, tmp_path, words, message):
    source = write_corpus(tmp_path / "corpus", "hub")
    words = [w.replace("{folder}", str(tmp_path / "corpus")) for w in words]
    with pytest.raises(ConfigError, match=message):
        prepare(corpus_for(tmp_path, source, *words))


@pytest.mark.cluster
def test_a_wrong_line_met_by_a_task_is_one_line_and_no_traceback(ray_here, tmp_path, capfd):
    source = write_corpus(tmp_path / "corpus", "json")
    (tmp_path / "corpus" / "more.jsonl").write_text('{"text": "a"}\n{"text": 12}\n')
    with pytest.raises(ConfigError) as error:
        prepare(corpus_for(tmp_path, source))
    what = "line 2: data.text_column=text is 12, not a string; write it as a string"
    assert str(error.value) == f"{tmp_path}/corpus/more.jsonl, {what}"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.cluster
def test_every_row_is_a_document_or_left_out_and_counted(ray_here, tmp_path, caplog):
    texts = [text for i, line in enumerate(TEXTS) for text in (line, ["", " \n", None][i % 3], "see <|endoftext|>")]
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts, "id": range(360)}), folder / "a.parquet")
    (folder / "_SUCCESS").touch()
    caplog.set_level("INFO", "kforcing")
    prepared = prepare(corpus_for(tmp_path, folder, "data.id_column=id"))
    manifests = [json.loads((prepared.split(name) / MANIFEST).read_text()) for name in ("train", "heldout")]
    counts = {name: sum(manifest[name] for manifest in manifests) for name in ("documents", "null", "blank", "special")}
    assert counts == {"documents": 240, "null": 40, "blank": 80, "special": 120}
    assert f"{folder}: 1 parquet files, " in caplog.text
    assert f"1 skipped: 1 hidden or temporary: {folder}/_SUCCESS" in caplog.text
    assert "left out: 40 rows without a text, 80 blank documents" in caplog.text
    assert "120 in all, are encoded as text" in caplog.text
    store = TokenStore(prepared.split("train"), 0)
    tokens = to_numpy(store.read(np.arange(store.rows_per_epoch))["tokens"])
    eos = tokens == eos_id(load_tokenizer(prepared.tokenizer))
    assert not (eos[:, 1:] & eos[:, :-1]).any()
    with_tokens = prepare(corpus_for(tmp_path, folder, "data.id_column=id", "data.special_tokens=true"))
    assert with_tokens.facts()["train"]["tokens"] < prepared.facts()["train"]["tokens"]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "train/*.parquet": flip,
    "heldout/*.parquet": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "train/manifest.json": lambda file: file.write_text('{"rows": 1'),
    "heldout/manifest.json": lambda file: file.write_text(""),
    "tokenizer/tokenizer.json": lambda file: file.write_text(""),
    "tokenizer/conventions.json": lambda file: file.write_text(file.read_text().replace("endoftext", "other")),
}


@pytest.mark.cluster
def test_a_damaged_file_of_a_corpus_is_named_and_made_again(ray_here, tmp_path, caplog):
    spec = corpus_for(tmp_path, write_corpus(tmp_path / "corpus", "text"))
    prepared = prepare(spec)

    def contents():
        files = (file for file in prepared.folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {str(f.relative_to(prepared.folder)): f.read_bytes() for f in files if f.name != MANIFEST}

    whole = contents()
    for pattern, damage in DAMAGES.items():
        caplog.clear()
        file = next(prepared.folder.glob(pattern))
        damage(file)
        assert prepare(spec) == prepared
        assert contents() == whole
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == 1, pattern
        assert warned[0].startswith(str(file.parent if file.parent == prepared.tokenizer else file))
    caplog.clear()
    prepare(spec)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
