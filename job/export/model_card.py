"""The README.md of an exported critic: what it is, how to use it, how good it is, its origin."""

from __future__ import annotations

import re

import yaml

from job.common.data_file import described
from job.common.nested import to_dict
from job.common.schema import Loss
from job.common.version import commit
from job.data.tokenizer import Tokenizer
from job.export.chat_template import ReadText
from job.run.trained import TrainedCritic

TOKENS, SEQUENCES = "token-classification", "sequence-classification"
META, DELTA = "meta", "delta"
_EVALUATION = "validation/value/"
_SHOWN = (
    "mse",
    "mse_constant",
    "r2",
    "std_prediction",
    "ece",
    "last_token_auc",
    "length_auc",
    "pairwise_accuracy",
    "pairwise_pairs",
    "tokens",
    "sequences",
)
_COUNTS = ("pairwise_pairs", "tokens", "sequences")
_USE = {
    TOKENS: """
    AutoModelForTokenClassification.from_pretrained(FOLDER)

`logits[..., 0]` are the outputs, one for each token. Nothing is dropped before the head in
training mode (`classifier_dropout` 0). The default loss of transformers is 0 with one label: bring
your own.""",
    SEQUENCES: """
    AutoModelForSequenceClassification.from_pretrained(FOLDER)

`logits[:, 0]` is the output at the last token that is no padding.""",
    META: """
`consolidated.pth` and `params.json` are the trunk, without a language-model head;
`value_head.safetensors` holds `weight` and, if the head has one, `bias`. An output is
`weight @ norm(h) + bias`, where `h` leaves the last block.""",
    DELTA: """
    python -m job.score --critic FOLDER --trunk TRUNK --data FILE --out values.parquet
    python -m job.export --critic FOLDER --trunk TRUNK --format token-classification --out DIR

These are the trained parameters alone: they belong to one trunk, which is known by its
fingerprint.""",
}


_OF_BINS = (
    "The outputs of a token are logits of bins, and its value is the mean of that distribution, in "
    "units of the reward: `softmax(outputs) @ bin_centres`"
)
_BINS_OF_TOKENS = (
    ", as `config.json` has them. With `centres = torch.tensor(model.config.bin_centres)` values "
    "are `model(**tokens).logits.softmax(-1) @ centres`."
)
_BINS_OF_HEAD = ", as `value_head.safetensors` has them, or the run's `config.yaml` means."
_USE_OF_TEMPLATE = """\
From a chat of one message and its answer, `chat_template.jinja` makes this text:

    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    tokenizer.apply_chat_template(chat)"""


def model_card(trained: TrainedCritic, form: str, tokenizer: Tokenizer, read: ReadText) -> str:
    """The card's text, in Markdown."""
    parts = [
        _head(form),
        "# A critic\n\nIt values each token of a response: the reward that is to be expected once "
        "the response is complete.",
        f"## Use\n{_USE[form]}",
        _meaning(trained, form),
        _before_responses(trained),
        f"## What it reads\n\n{_tokens(trained, form, tokenizer, read)}",
        f"## Quality\n\n{_quality(trained)}",
        f"## Origin\n\n{_origin(trained)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bias_note(trained: TrainedCritic) -> str:
    """What becomes of the head's bias where transformers has none; empty if there is none."""
    if "value_head.bias" not in trained.weights.shapes:
        return ""
    bias = trained.weights.read("value_head.bias").item()
    return (
        f"This head has no bias, and the critic's is {bias:.6g}: add it to each output. Train with "
        "training.value_head.bias=false for a critic without."
    )


def _head(form: str) -> str:
    facts = {TOKENS: {"library_name": "transformers"}, SEQUENCES: {"library_name": "transformers"}}
    described = facts.get(form, {}) | {"tags": ["critic", "value-model"]}
    return f"---\n{yaml.safe_dump(described)}---"


def _meaning(trained: TrainedCritic, form: str) -> str:
    """What an output is."""
    loss = trained.config.objective.loss
    if loss is Loss.bce:
        text = "Outputs are logits: a value is `sigmoid(output)`."
    elif loss is Loss.hl_gauss:
        text = _OF_BINS + (_BINS_OF_TOKENS if form == TOKENS else _BINS_OF_HEAD)
    elif trained.config.objective.ranks_only:
        text = "Outputs rank responses to one prompt: only their differences mean anything."
    else:
        text = "Outputs are values, in units of the reward."
    gamma = trained.config.objective.gamma
    if gamma != 1:
        text += f" The reward is discounted by {gamma} a token."
    note = bias_note(trained) if form == SEQUENCES else ""
    return f"{text} {note}".strip()


def _before_responses(trained: TrainedCritic) -> str:
    """Whether the first value that PPO reads means anything."""
    where = "The output at the last token of a prompt, the first that PPO reads,"
    if trained.config.objective.trains_prompts:
        return f"{where} is trained as the others are."
    return f"{where} was not trained (objective.prompt_value)."


def _tokens(trained: TrainedCritic, form: str, tokenizer: Tokenizer, read: ReadText) -> str:
    """The very text that prompt and response are put into, and how it becomes tokens."""
    length = trained.config.data.max_length
    parts = [f"At most {length} tokens; its last value stands at the end token, if there is one."]
    for what, text in read.shown():
        parts.append(f"{what[0].upper()}{what[1:]}:\n\n{_fenced(text)}")
    parts.append("A response that was cut off has nothing behind it.")
    if form in (TOKENS, SEQUENCES):
        parts.append(_USE_OF_TEMPLATE)
        if tokenizer.bos_id is not None:
            begin = tokenizer.token_text(tokenizer.bos_id)
            parts.append(
                f"`tokenizer(text)` puts `{begin}` before a text itself: leave it out there, or "
                "say `add_special_tokens=False`. It puts nothing behind a text."
            )
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _quality(trained: TrainedCritic) -> str:
    figures = trained.facts["evaluation"]
    shown = {n: figures[_EVALUATION + n] for n in _SHOWN if _EVALUATION + n in figures}
    rows = [
        f"| {n} | {v:,.0f} |" if n in _COUNTS else f"| {n} | {v:.4g} |" for n, v in shown.items()
    ]
    if not rows:
        return "No evaluation was made at this step."
    head = "On the validation data, over all response tokens:\n\n| | |\n|---|---|\n"
    return head + "\n".join(rows)


def _origin(trained: TrainedCritic) -> str:
    config, facts = trained.config, trained.facts
    n = trained.num_unfrozen_layers
    blocks = len(trained.on_meta().trunk.layers)
    rows = {
        "base": config.model.path,
        "fingerprint of the base": facts["identity"]["base"],
        "trained": f"N = {n} of {blocks} blocks"
        + {0: ": the value head alone"}.get(n, ", the final norm and the value head"),
        "steps": f"{facts['step']} of {config.training.batch_size} sequences",
        "training data": described(config.data.train),
        "validation data": described(config.data.validation),
        "objective": ", ".join(f"{k} {v}" for k, v in to_dict(config)["objective"].items()),
        "run": config.run.name,
        "commit of the training": facts.get("commit") or "unknown",
        "commit of the export": commit() or "unknown",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
