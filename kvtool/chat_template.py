"""Chat templates that come with processors, for conversations of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool._tensors import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AS_PARTS = (
    "{%- set of_parts = namespace(turns=[]) -%}"
    "{%- for turn in messages -%}"
    "{%- set said = turn['content'] -%}"
    "{%- if said is string -%}{%- set said = [{'type': 'text', 'text': said}] -%}{%- endif -%}"
    "{%- set of_parts.turns = of_parts.turns + [dict(turn, content=said)] -%}"
    "{%- endfor -%}"
    "{%- set messages = of_parts.turns -%}"
)
_WORD = "kvtool"


def of_processor(folder: Path) -> str | None:
    """The template in the file of its own that processors have had."""
    file = folder / "chat_template.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    return template if isinstance(template, str) else None


def take_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the template of a tokenizer take turns of text, if it takes only lists of parts.

    Some that are for several modalities do: given a text, they leave it out without a word.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or _shows_text(tokenizer, template):
        return
    if _shows_text(tokenizer, _AS_PARTS + template):
        tokenizer.chat_template = _AS_PARTS + template


def _shows_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    asked: Any = [{"role": "user", "content": _WORD}]
    try:
        shown = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
    except Exception:  # a template comes with the checkpoint and raises what it likes
        return False
    return _WORD in str(shown)
