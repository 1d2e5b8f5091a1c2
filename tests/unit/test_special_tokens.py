"""Special tokens: in a text, declared beside a tokenizer, and where a sequence begins and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from kinds_of_tokenizers import KINDS, Plain, encode, saved, sentencepiece_model, with_settings
from tokenizers import models, normalizers, processors

from job.common.errors import InputError
from job.data.tokenizer import Tokenizer, load_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_begin_and_end_token_in_a_text_are_tokens_and_not_doubled(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = KINDS[kind](tmp_path)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for prompt, response in (("<s>the", " cat"), ("the", " cat</s>"), ("<s>the", " cat</s>")):
        ids = encode(tokenizer, prompt, response).ids
        assert (ids.count(bos), ids.count(eos)) == (1, 1)
        assert (ids[0], ids[-1]) == (bos, eos)
    within = encode(tokenizer, "the</s>", "</s><s> cat")
    n = within.response_start
    assert within.ids[n - 1 : n + 2] == [eos, eos, bos]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_frame_nothing_is_added(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    (bare,) = tokenizer.encode([("the", " cat")], framed=False)
    framed = encode(tokenizer, "the", " cat")
    assert framed.ids == [tokenizer.bos_id, *bare.ids, tokenizer.eos_id]
    assert bare.response_start == framed.response_start - 1
    (own,) = tokenizer.encode([("<s>the", " cat</s>")], framed=False)
    assert (own.ids[0], own.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (own.ends[0], own.ends[-2:]) == (3, [10, 14])


def test_sentencepiece_begins_anew_after_a_begin_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece_model(tmp_path, "bpe")
    written, added = encode(tokenizer, "<s>the", " cat"), encode(tokenizer, "the", " cat")
    assert (written.ids, written.response_start) == (added.ids, added.response_start)
    assert encode(tokenizer, "<s>", "the cat").ids == encode(tokenizer, "", "the cat").ids


ADDED = {"32": {"content": "<|im_start|>"}, "400": {"content": "<|im_end|>", "special": True}}


def test_sentencepiece_knows_the_tokens_added_beside_it(tmp_path: Path) -> None:
    tokenizer = sentencepiece_model(
        tmp_path / "a", "bpe", added_tokens_decoder=ADDED, eos_token="<|im_end|>"
    )
    assert tokenizer.eos_id == 400
    assert tokenizer.vocab_size == 401
    encoded = encode(tokenizer, "<|im_start|>the", " cat<|im_end|>")
    plain = Plain(tmp_path / "a")
    assert encoded.ids[:2] == [1, 32]
    assert plain.decode(encoded.ids[2:-1]) == "the cat"
    assert plain.encode("the")[0] not in encoded.ids  # no blank in the middle
    (tmp_path / "b").mkdir()
    (tmp_path / "b/added_tokens.json").write_text('{"<|im_start|>": 32, "<|im_end|>": 400}')
    other = sentencepiece_model(tmp_path / "b", "bpe", eos_token="<|im_end|>")
    assert encode(other, "<|im_start|>the", " cat<|im_end|>") == encoded
    assert other.fingerprint == tokenizer.fingerprint
    assert sentencepiece_model(tmp_path / "c", "bpe").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "added", [{"x": {"content": "<a>"}}, {"3": "<a>"}, {"3": {}}, ["<a>"], None]
)
def test_an_added_token_without_text_or_number_is_an_input_error(
    tmp_path: Path, added: object
) -> None:
    with pytest.raises(InputError, match="a token without text or number"):
        sentencepiece_model(tmp_path, "bpe", added_tokens_decoder=added)


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>", "<s>"])
@pytest.mark.parametrize("kind", ["byte-level BPE", "sentencepiece BPE"])
def test_the_end_token_is_a_response_token_whatever_the_padding_token_is(
    tmp_path: Path, kind: str, pad: str | None
) -> None:
    KINDS[kind](tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    for response in (" cat", " cat</s>"):
        encoded = encode(tokenizer, "the", response)
        of_response = encoded.ids[encoded.response_start :]
        assert of_response[-1] == tokenizer.eos_id
        assert of_response.count(tokenizer.eos_id) == 1
        assert len(of_response) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_has_one_end_token_and_it_is_the_last_one(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    plain = encode(tokenizer, "the", " cat")
    for brought in ("</s>", "</s>\n", "</s> \n\t", "</s></s>", "</s>\n</s>\n"):
        assert encode(tokenizer, "the", " cat" + brought) == plain
    alone = encode(tokenizer, "the</s>", "</s>\n")
    assert alone.ids[alone.response_start :] == [tokenizer.eos_id]
    assert encode(tokenizer, "the", " cat\n").ids != plain.ids, "blanks alone stay"


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_that_was_cut_off_has_no_end_token(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    whole = encode(tokenizer, "the", " cat")
    for response in (" cat", " cat</s>\n"):
        pairs = [("the", response), ("the", " cat")]
        cut, other = tokenizer.encode(pairs, ended=[False, True])
        assert (cut.ids, cut.ends) == (whole.ids[:-1], whole.ends[:-1])
        assert other == whole


def test_an_end_token_that_swallows_blanks_does_so_where_it_is_added(
    tmp_path: Path, bpe_folder: Path
) -> None:
    parts = json.loads((bpe_folder / "tokenizer.json").read_text())
    parts["added_tokens"][1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = load_tokenizer(tmp_path)
    raw = tokenizers.Tokenizer.from_str(json.dumps(parts))
    assert encode(tokenizer, "the", " cat  ").ids == [0, *raw.encode("the cat  </s>").ids]


STEP = {"content": "<step>", "special": True, "normalized": False}
DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoder": ({"added_tokens_decoder": {"900": STEP}}, {}),
    "ordinary": ({"added_tokens_decoder": {"900": STEP | {"special": False}}}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {"<step>": 900}}),
    "map": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<step>"]}}),
    "additional": ({"additional_special_tokens": ["<step>"]}, {}),
    "extra": ({"extra_special_tokens": {"step_token": "<step>"}}, {}),
    "extra list": ({"extra_special_tokens": ["<step>"]}, {}),
    "padding": ({"pad_token": "<step>"}, {}),
    "padding in the map": ({}, {"special_tokens_map.json": {"pad_token": STEP}}),
}


def beside(folder: Path, source: Path, name: str) -> Tokenizer:
    settings, files = DECLARED[name]
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return with_settings(folder, source, {"bos_token": "<s>", "eos_token": "</s>"} | settings)


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_token_is_one_token_with_the_next_id(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, name: str
) -> None:
    tokenizer = beside(tmp_path, bpe_folder, name)
    step = bpe.vocab_size
    assert encode(tokenizer, "the<step>", " cat<step>").ids == [
        *encode(bpe, "the", "").ids[:-1],
        step,
        *encode(bpe, "", " cat").ids[1:-1],
        step,
        1,
    ]
    assert tokenizer.vocab_size == step + 1
    assert (tokenizer.fingerprint == bpe.fingerprint) == name.startswith("padding")


def test_a_declared_flag_counts_and_what_changes_nothing_keeps_the_fingerprint(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer
) -> None:
    def told(name: str, **flags: bool) -> Tokenizer:
        (tmp_path / name).mkdir()
        decoder = {"1": {"content": "</s>", "special": True, "normalized": False, **flags}}
        named = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder}
        return with_settings(tmp_path / name, bpe_folder, named)

    same, strips = told("same"), told("strips", rstrip=True)
    assert same.fingerprint == bpe.fingerprint != strips.fingerprint
    text = "the</s> cat"
    assert encode(same, text, "").ids != encode(strips, text, "").ids


def test_names_in_the_older_map_count_where_no_newer_list_is_there(
    tmp_path: Path, bpe_folder: Path
) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "."}')
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    older = with_settings(tmp_path, bpe_folder, named)
    assert older.eos_id == older.token_id(".")
    newer = with_settings(tmp_path, bpe_folder, named | {"added_tokens_decoder": {}})
    assert newer.eos_id == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_token": "<step>"}, "image_token '<step>'"),
        (
            {"extra_special_tokens": ["<step>"], "additional_special_tokens": ["</s>"]},
            "'<step>' among additional_special_tokens and extra_special_tokens",
        ),
    ],
)
def test_what_versions_of_transformers_read_each_in_its_way_is_refused_by_name(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"{said} is not the same token.*added_tokens_decoder"):
        with_settings(tmp_path, bpe_folder, settings)
    known = settings | {"added_tokens_decoder": {"900": STEP}}
    assert with_settings(tmp_path, bpe_folder, known).token_id("<step>") == bpe.vocab_size


def test_an_older_special_token_before_which_the_text_is_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<step>": 900}')
    listed = {"additional_special_tokens": ["<step>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(listed))
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    raw.normalizer = normalizers.Prepend("▁")
    with pytest.raises(
        InputError, match=r"added_tokens\.json and special_tokens_map\.json: '<step>'"
    ):
        saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, (0, 1)),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": 0}}, (0, 1)),
        ({"bos_token": "</s>", "eos_token": "."}, (1, ".")),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, (None, 1)),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, (0, 1)),
        ({"bos_token": None, "eos_token": "</s>"}, (None, 1)),
        ({"bos_token": None, "eos_token": None}, (None, None)),
        ({}, (0, 1)),
        (None, (0, 1)),
    ],
)
def test_begin_and_end_token_are_those_of_the_settings_or_the_usual_ones(
    tmp_path: Path,
    bpe_folder: Path,
    library: tokenizers.Tokenizer,
    settings: dict[str, Any] | None,
    expected: tuple[int | str | None, int | str | None],
) -> None:
    tokenizer = with_settings(tmp_path, bpe_folder, settings)
    bos, eos = (library.token_to_id(e) if isinstance(e, str) else e for e in expected)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    encoded = encode(tokenizer, "the", " cat")
    first, last = [bos] * (bos is not None), [eos] * (eos is not None)
    assert encoded.ids == [*first, *library.encode("the cat").ids, *last]
    assert encoded.response_start == len(first) + 1
    assert len(encoded.ends) == len(encoded.ids)


BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
BYTES = processors.ByteLevel(trim_offsets=False)
LLAMA, PLAIN = {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}


# As transformers 4.57 has it with the classes of Llama's kind, and all its versions with others.
@pytest.mark.parametrize(
    ("settings", "processor", "begins"),
    [
        (PLAIN, None, False),
        (PLAIN, BYTES, False),
        (PLAIN, BEGIN, True),
        (PLAIN, BOTH, True),
        (PLAIN, processors.Sequence([BYTES, BEGIN]), True),
        (PLAIN | {"add_bos_token": False}, BEGIN, True),
        (PLAIN | {"add_bos_token": True}, BYTES, True),
        (LLAMA, None, True),
        (LLAMA, BYTES, True),
        (LLAMA | {"add_bos_token": False}, None, False),
        (LLAMA | {"add_bos_token": False}, BEGIN, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}, BYTES, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, BEGIN, True),
        ({}, None, True),
        ({}, BEGIN, True),
    ],
)
def test_a_begin_token_is_put_where_the_tokenizer_puts_one(
    tmp_path: Path, bpe_folder: Path, settings: dict[str, Any], processor: Any, begins: bool
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if processor is not None:
        raw.post_processor = processor
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>", **settings)
    plain = raw.encode("the cat", add_special_tokens=False).ids
    assert encode(tokenizer, "the", " cat").ids == [0] * begins + plain + [1]
    assert tokenizer.named["bos_token"] == "<s>", "templates know its name all the same"


@pytest.mark.parametrize(("model", "begins"), [("llama", True), ("qwen2", False), ("gpt2", False)])
def test_without_a_class_the_model_beside_the_tokenizer_decides(
    tmp_path: Path, bpe_folder: Path, model: str, begins: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    tokenizer = with_settings(tmp_path, bpe_folder, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (tokenizer.bos_id is not None) == begins


def test_two_tokens_before_a_text_are_refused(tmp_path: Path, bpe_folder: Path) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    with pytest.raises(InputError, match="puts 2 tokens before a text; one is supported"):
        saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")


def test_a_vocabulary_without_the_usual_names_has_neither(tmp_path: Path) -> None:
    model = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
