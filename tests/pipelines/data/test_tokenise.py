import numpy as np
import pytest

from kforcing.loading import load_tokenizer
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import corpus_spec
from pipelines.data.corpus import document_id, is_heldout, source_digest
from pipelines.data.rows import to_numpy
from pipelines.data.token_store import TokenStore
from pipelines.data.tokenise import eos_id, pack, prepare, sequence_ids


def test_packing_ends_documents_with_eos_and_drops_the_tail():
    blocks, owners = pack([[5, 6, 7], [8], [9, 10]], np.array([100, 200, 300]), block=4, eos=1)
    assert blocks.tolist() == [[5, 6, 7, 1], [8, 1, 9, 10]]
    assert owners.tolist() == [100, 200]
    assert blocks.dtype == np.int32


def test_a_block_belongs_to_the_document_of_its_first_token():
    _, owners = pack([[5, 6], [7, 8, 9, 10]], np.array([100, 200]), block=2, eos=1)
    assert owners.tolist() == [100, 100, 200, 200]  # the second block begins with the first document's EOS


def test_sequence_ids_are_hashes_of_content():
    ids = sequence_ids(np.array([[1, 2], [3, 4], [1, 2]], np.int32))
    assert ids[0] == ids[2] != ids[1]
    assert (ids >= 0).all()


def test_the_split_is_a_function_of_the_id():
    docs = np.array([document_id(f"doc {i}") for i in range(20_000)])
    held = is_heldout(docs, 0.1)
    assert abs(held.mean() - 0.1) < 0.01
    assert (is_heldout(docs[::-1], 0.1)[::-1] == held).all()
    assert (is_heldout(docs, 0.2) >= held).all()


def test_the_digest_follows_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    first = source_digest(DataConfig(source=str(file)))
    assert source_digest(DataConfig(source=str(file))) == first
    file.write_text("two\n")
    assert source_digest(DataConfig(source=str(file))) != first


TEXTS = [f"Document number {i} tells of {i % 7} things and of nothing else at all." for i in range(120)]


def write_corpus(folder, kind):
    """The same documents as text, JSON lines, Parquet or a `datasets` folder; returns data.source."""
    import datasets

    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict({"text": TEXTS, "name": [f"d{i}" for i in range(120)]})
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
    ],
)
def test_a_source_that_turns_out_unreadable_during_reading_gives_a_clear_error(ray_here, tmp_path, words, message):
    source = write_corpus(tmp_path / "corpus", "hub")
    words = [w.replace("{folder}", str(tmp_path / "corpus")) for w in words]
    with pytest.raises(ConfigError, match=message):
        prepare(corpus_for(tmp_path, source, *words))
