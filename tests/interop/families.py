"""Small tokenizers of each kind that supported models come with, and trunks to go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from kinds_of_tokenizers import write_llama_3
from pieces import train_llama_pieces
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from job.data.tiktoken import N_RANKS

TEXTS = [f"we need to add {a} and {b}, that makes {a + b}." for a in range(12) for b in range(12)]
_BAR = "\N{FULLWIDTH VERTICAL LINE}"
_DEEPSEEK = ("begin▁of▁sentence", "end▁of▁sentence", "▁pad▁")
SIZE = 480  # rows of the embeddings, more than any of these tokenizers has tokens
_LETTERS = list("▁abcdefghijklmnopqrstuvwxyz0123456789.,:?QA")
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3_CHAT = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\\n' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}"
    "{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """How to write such a tokenizer, and what stands in the run's configuration.

    Attributes:
        trunk: the model's name in transformers.
        template: `data.template`.
    """

    write: Callable[[Path], None]
    trunk: str = "Llama"
    template: str | None = None
    fields: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


def _save(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _begin(token: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _byte_level(special: list[str], split: str | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = whole
    if split is not None:
        steps = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def llama_2(folder: Path) -> None:
    """Sentencepiece's BPE as tokenizer.json: TinyLlama, Zephyr, Vicuna."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=_LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = _begin("<s>", 1)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    told = {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    _save(folder, tokenizer, tokenizer_class="LlamaTokenizer", **named, **told)


def llama_3(folder: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _byte_level(
        [*special, "<|eot_id|>"], _QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begin("<|begin_of_text|>", 0)]
    )
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    _save(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **named)


def deepseek(folder: Path) -> None:
    """Byte-level, but called LlamaTokenizerFast: deepseek-coder, R1 distilled into Llama."""
    begin, end, pad = (f"<{_BAR}{text}{_BAR}>" for text in _DEEPSEEK)
    tokenizer = _byte_level([begin, end, pad])
    tokenizer.post_processor = _begin(begin, 0)
    named = {"bos_token": begin, "eos_token": end, "pad_token": pad}
    told = {"add_bos_token": True, "add_eos_token": False}
    _save(folder, tokenizer, tokenizer_class="LlamaTokenizerFast", **named, **told)


def qwen(folder: Path) -> None:
    """The end token is a turn's, no begin token; step marks are declared beside tokenizer.json."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], _QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    step = tokenizer.get_vocab_size()
    decoder = {str(step): {"content": "<extra_0>", "special": True, **flags}}
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    told = {"add_bos_token": False, "add_prefix_space": False, "chat_template": CHAT_ML}
    _save(
        folder,
        tokenizer,
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder=decoder,
        unk_token=None,
        **named,
        **told,
    )


def smollm(folder: Path) -> None:
    """A begin token is named, and put nowhere: SmolLM, GPT-2, Granite's code models."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    _save(folder, tokenizer, tokenizer_class="GPT2Tokenizer", pad_token="<|im_end|>", **named)


def sentencepiece_model(folder: Path) -> None:
    """Only tokenizer.model, as Meta and Mistral ship it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_llama_pieces(TEXTS))


def tiktoken(folder: Path) -> None:
    """Llama 3's own tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_llama_3(folder, _byte_level([], _QWEN_SPLIT))


TIKTOKEN = Family(tiktoken, template="{prompt}\n{response}", sizes={"vocab_size": N_RANKS + 256})
FAMILIES: dict[str, Family] = {
    "llama 2": Family(llama_2, template="Q: {prompt}</s>\nA:{response}"),
    "llama 3": Family(llama_3, template=LLAMA_3_CHAT),
    "deepseek": Family(deepseek, fields="alpaca"),
    "qwen 2": Family(qwen, "Qwen2", "chat"),
    "qwen 3": Family(qwen, "Qwen3", "<extra_0>{prompt} ->{response}", sizes={"head_dim": 8}),
    "smollm": Family(smollm),
    "mistral": Family(sentencepiece_model, "Mistral", BRACKETS, sizes={"sliding_window": None}),
    "meta": Family(sentencepiece_model, template="{prompt} So{response}\n"),
}


_STEP = {"content": "<step>", "special": True, "normalized": False}
_END = _STEP | {"content": "</s>"}
# Settings, and other files beside them, that declare tokens which tokenizer.json does not have.
DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoder": ({"added_tokens_decoder": {"901": {"content": "<b>"}, "900": _STEP}}, {}),
    "flags": ({"added_tokens_decoder": {"900": _STEP | {"lstrip": True, "special": False}}}, {}),
    "normalized": ({"added_tokens_decoder": {"900": _STEP | {"normalized": True}}}, {}),
    "of the file": (
        {"added_tokens_decoder": {"2": _STEP | {"content": "</s>", "rstrip": True}}},
        {},
    ),
    "added_tokens.json": ({}, {"added_tokens.json": {"<step>": 901, "<b>": 900, "</s>": 2}}),
    "map": (
        {"pad_token": "<b>"},
        {
            "special_tokens_map.json": {
                "pad_token": _STEP | {"lstrip": True},
                "additional_special_tokens": ["<c>"],
                "eos_token": "<b>",
            },
            "added_tokens.json": {"<b>": 900},
        },
    ),
    "not read": (
        {"added_tokens_decoder": {}},
        {"added_tokens.json": {"<step>": 900}, "special_tokens_map.json": {"eos_token": "<unk>"}},
    ),
    "lists": ({"additional_special_tokens": ["<c>", "<b>"], "pad_token": "<step>"}, {}),
    "by name": ({"extra_special_tokens": {"a_token": "<step>", "b_token": "<b>"}}, {}),
    "names": ({"mask_token": "<b>", "cls_token": "<step>", "sep_token": "<c>"}, {}),
}


def write_declared(folder: Path, name: str, *, normalizes: bool) -> None:
    """A tokenizer with `<s>` and `</s>`, and what is declared beside it."""
    if normalizes:
        llama_2(folder)
    else:
        tokenizer = _byte_level(["<unk>", "<s>", "</s>"])
        _save(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    settings, files = DECLARED[name]
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(told | settings))
    for other, content in files.items():
        (folder / other).write_text(json.dumps(content))
