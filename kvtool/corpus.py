"""Text to calibrate on and text to judge by, which never meet.

By default both are the documentation of the running Python (`pydoc_data.topics`): English prose
with code, always present; what trains longer than it lasts also reads docstrings. A file or hub
data set takes its place with `--data`; it is cut in the same way, so that the same `--data` for
calibration and for evaluation gives two disjoint texts.

Tokens that a chat model sees between turns occur in no prose, and what is measured on prose alone
does not keep them. So a share of the windows can be conversations made of the text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.text import check_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "evaluation"]

_SEPARATOR = "\n\n"
# Plain text has no documents, so it is cut into pieces of about this many characters between
# paragraphs: long enough to fill a window of some thousand tokens with one context.
_PIECE = 24_000
_HUB_CHARACTERS = 20_000_000
# Characters of a passage of a conversation, at most: turns have to end often.
_PASSAGE = 600
_QUESTIONS = (
    "Explain: {}",
    "Continue this text:\n\n{}",
    "{}\n\nWhat comes next?",
    "Tell me more about this: {}",
    "I have read the following. How does it go on?\n\n{}",
)
# Some templates tell the model what day it is, and no measurement may depend on it.
_FIXED_DAY = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}{{ '' }}"

_UNREAD = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_LONG_DOCSTRING = 200  # characters; shorter ones say what the name says

Messages = list[dict[str, str]]
"""Turns of a conversation: `role` and `content`."""


@dataclass(frozen=True)
class Corpus:
    """Some documents.

    Attributes:
        name: Where they come from, and which part of it they are.
        documents: The texts.
    """

    name: str
    documents: list[str]

    @property
    def id(self) -> str:
        """The name and the start of a hash of the content."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{len(document)}\n{document}".encode())
        return f"{self.name}-{digest.hexdigest()[:12]}"

    def windows(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        count: int,
        seed: int = 0,
        chat: float = 0.0,
    ) -> torch.Tensor:
        """Token windows `[count, length]` (int64) that share no token of the documents.

        The documents are shuffled by `seed`, joined by an empty line and cut. Where the tokenizer
        starts a text with a BOS token, so does each window: models lean on it as an attention sink.

        Windows of conversations lie evenly among the others. They hold conversations in the
        tokenizer's chat template, from the beginning of one on: users show passages of the text,
        and the assistant answers with what follows.

        Args:
            chat: Share of the windows that are conversations, 0 to 1; none of them are if the
                tokenizer has no template for it, see `can_chat`.

        Raises:
            UsageError: The corpus has fewer tokens than that.
        """
        import torch

        start = start_tokens(tokenizer)
        fresh = length - len(start)  # tokens of text in a window
        generator = random.Random(seed)
        order = generator.sample(self.documents, len(self.documents))
        if chat and not can_chat(tokenizer):
            chat = 0.0
        talking = int(chat * count + 0.5)
        plain = count - talking
        shared = functools.partial(_shared, order, talking / max(count, 1), min(_PASSAGE, length))
        ids = _joined(tokenizer, (text for text, _ in shared() if text), plain * fresh)
        if len(ids) < plain * fresh or fresh < 1:
            beside = " beside conversations" if talking else ""
            raise self._too_short(
                f"has {len(ids)} tokens{beside}, fewer than the {plain * fresh} of {plain} windows "
                f"of {length}"
            )
        exchanges = _exchanges((p for _, passages in shared() for p in passages), generator)
        chats = _chat_windows(tokenizer, exchanges, generator, start, length)
        found = list(itertools.islice(chats, talking))
        if len(found) < talking:
            raise self._too_short(
                f"fills {len(found)} windows of {length} with conversations, fewer than {talking}"
            )
        windows = torch.empty(count, length, dtype=torch.int64)
        windows[:, : len(start)] = torch.tensor(start, dtype=torch.int64)
        talks = [int(chat * (i + 1) + 0.5) > int(chat * i + 0.5) for i in range(count)]
        chosen = torch.tensor(talks, dtype=torch.bool)
        windows[~chosen, len(start) :] = torch.tensor(ids, dtype=torch.int64).view(plain, fresh)
        windows[chosen] = torch.tensor(found, dtype=torch.int64).view(talking, length)
        return windows

    def count_tokens(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
        """Tokens of the text, counted no further than to `limit`."""
        count = 0
        for document in self.documents:
            count += len(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
            if count >= limit:
                break
        return min(count, limit)

    def excerpt(self, characters: int) -> list[str]:
        """The first documents, as many as it takes to have that many characters, or all."""
        sums = itertools.accumulate(map(len, self.documents), initial=0)
        return [d for d, before in zip(self.documents, sums, strict=False) if before < characters]

    def _too_short(self, why: str) -> UsageError:
        return UsageError(
            f"The corpus {self.name} {why}.",
            hint="Ask for fewer or shorter windows, or name a longer text with --data.",
        )


def can_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template is there and takes turns of a user and an assistant."""
    try:
        chat_tokens(tokenizer, 2 * _exchange("Hello", "Hello"))
    except UnsupportedModelError:
        return False
    return True


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    answer: bool = False,
    today: bool = False,
) -> list[int]:
    """The token ids of a conversation, as the model was trained to read it.

    Args:
        answer: End where an answer begins.
        today: Let the template know what day it is; otherwise all days are the same.

    Raises:
        UnsupportedModelError: There is no chat template, or none that takes these turns.
    """
    if not tokenizer.chat_template:
        raise UnsupportedModelError("no chat template is there")
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            chat_template=("" if today else _FIXED_DAY) + tokenizer.get_chat_template(),
            add_generation_prompt=answer,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception as error:  # a template comes with the checkpoint and raises what it likes
        raise UnsupportedModelError(
            f"the chat template does not take this conversation: {error}"
        ) from error
    if not ids:
        raise UnsupportedModelError("the chat template makes nothing of this conversation")
    return list(ids)


def calibration_text(data: str | None = None) -> Corpus:
    """The text that statistics are taken from: about the first three quarters of the source.

    Args:
        data: A `.txt` file, a `.jsonl` file with a `text` field, a hub data set `owner/name` or
            `owner/name:config`, or nothing for Python's documentation.
    """
    return _part(data, "calibration")


def evaluation_text(data: str | None = None) -> Corpus:
    """The text that results are measured on: what `calibration_text` leaves of the same source."""
    return _part(data, "evaluation")


def training_text(data: str | None = None) -> Corpus:
    """The calibration text; Python's documentation is too short to train on alone.

    Docstrings of the standard library stand beside it, as far as its source is installed. They are
    terse: half of the text stays documentation, which is repeated for that.
    """
    text = calibration_text(data)
    if data is not None:
        return text
    judged = set().union(*map(_paragraphs, evaluation_text().documents))
    own = [d for d in _docstrings() if not _paragraphs(d) & judged]
    sizes = [sum(map(len, documents)) for documents in (text.documents, own)]
    repeated = max(1, round(sizes[1] / sizes[0]))
    return Corpus(f"{text.name}+docstrings", repeated * text.documents + own)


@functools.cache
def _docstrings() -> list[str]:
    """The longer docstrings of the standard library, those of a module as one document."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in sorted(_sources(library)):
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # some are there to test what reads them
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if texts := [text for text in found if text and len(text) >= _LONG_DOCSTRING]:
            documents.append(_SEPARATOR.join(texts))
    return documents


def _sources(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _UNREAD]
        yield from (Path(root, name) for name in files if name.endswith(".py"))


def _part(data: str | None, part: Part) -> Corpus:
    if data is None:
        return Corpus(f"python-docs/{part}", _python_topics()[part])
    name, documents = _load(data)
    parts = _cut(documents)
    if not parts[part]:
        raise UsageError(
            f"{data} is too short to give a calibration and an evaluation part.",
            hint="A text is cut between paragraphs, at an empty line; a .jsonl file between lines.",
        )
    return Corpus(f"{name}/{part}", parts[part])


@functools.cache
def _python_topics() -> dict[Part, list[str]]:
    """Python's documentation topics, split by a hash of their names.

    A third of the topics repeats paragraphs of a larger one ("if" is a section of "compound"), so
    splitting by name alone would put the same text on both sides.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: list[str] = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = _paragraphs(topics[topic])
        if 2 * len(paragraphs & seen) < len(paragraphs):
            kept.append(topic)
        seen |= paragraphs
    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    for topic in kept:
        held_out = hashlib.sha256(topic.encode()).digest()[-1] % 4 == 0
        parts["evaluation" if held_out else "calibration"].append(topics[topic])
    calibrated = set().union(*map(_paragraphs, parts["calibration"]))
    # What is left to share is a paragraph or two of short topics.
    parts["evaluation"] = [t for t in parts["evaluation"] if not _paragraphs(t) & calibrated]
    return parts


def _paragraphs(text: str) -> set[str]:
    """The paragraphs long enough to be recognised elsewhere, whatever their indentation."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= 40}


def _load(data: str) -> tuple[str, list[str]]:
    """A short name and the documents of a file or hub data set."""
    path = Path(data).expanduser()
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) and path.suffix not in (
            ".txt",
            ".jsonl",
        ):
            return data, _hub_documents(data)
        raise UsageError(
            f"There is no text at {data}.",
            hint="--data takes a .txt file, a .jsonl file, or a hub data set id (owner/name).",
        )
    try:
        if path.suffix == ".txt":
            documents = _pieces(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            documents = list(_jsonl_texts(path))
        else:
            raise UsageError(f"{data} is neither a .txt nor a .jsonl file.")
    except UnicodeDecodeError as error:
        raise UsageError(f"{data} is not UTF-8 text: {error.reason}.") from error
    except OSError as error:
        raise UsageError(f"{data} cannot be read: {error.strerror}.") from error
    return path.name, documents


def _jsonl_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f'Line {number} of {path} is not a JSON object with a "text" string.')
        try:
            check_text(text)
        except UsageError as error:
            raise UsageError(f"Line {number} of {path} cannot be read: {error}.") from error
        yield text


def _hub_documents(data: str) -> list[str]:
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise UsageError(
            f"{data} is not a file, and reading a hub data set needs the package datasets.",
            hint="pip install 'kvtool[data]'",
        ) from error
    name, _, config = data.partition(":")
    documents: list[str] = []
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        characters = 0
        for row in rows:
            documents.append(row["text"])
            characters += len(row["text"])
            if characters > _HUB_CHARACTERS:
                break
    except Exception as error:  # network, spelling, missing column: any of the library's exceptions
        raise UsageError(f"The hub data set {data} cannot be read: {error}") from error
    return documents


def _pieces(text: str) -> list[str]:
    """Cuts a text between paragraphs into pieces of about `_PIECE` characters."""
    pieces: list[list[str]] = [[]]
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        if size >= _PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += len(paragraph)
    return [_SEPARATOR.join(piece) for piece in pieces]


def _cut(documents: Iterable[str]) -> dict[Part, list[str]]:
    """The first documents, with three quarters of the characters, and the others.

    A document that occurs in both parts is removed from the second.
    """
    documents = [document for document in documents if document.strip()]
    if len(documents) == 1:
        paragraphs = documents[0].split(_SEPARATOR)
        middle = _three_quarters(paragraphs)
        documents = [_SEPARATOR.join(p) for p in (paragraphs[:middle], paragraphs[middle:]) if p]
        first = 1
    else:
        first = _three_quarters(documents)
    seen = set(documents[:first])
    return {
        "calibration": documents[:first],
        "evaluation": [document for document in documents[first:] if document not in seen],
    }


def _three_quarters(texts: list[str]) -> int:
    """How many texts it takes to reach three quarters of all characters, leaving at least one."""
    total = sum(map(len, texts))
    sums = itertools.accumulate(map(len, texts))
    return min(1 + sum(s < 0.75 * total for s in sums), max(len(texts) - 1, 1))


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that put one before a text."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _shared(documents: Iterable[str], share: float, size: int) -> Iterator[tuple[str, list[str]]]:
    """Of each document its first part, and the passages of the rest.

    At any point the rests have `share` of all characters so far, less than one passage short.
    """
    due = 0.0
    for document in documents:
        passages = _passages(document, size)
        cut = len(passages)
        due += share * len(document)
        while cut and len(passages[cut - 1]) <= due:
            cut -= 1
            due -= len(passages[cut])
        yield "".join(passages[:cut]), passages[cut:]


def _passages(text: str, size: int) -> list[str]:
    """Paragraphs, or where they have more than `size` characters, some lines or sentences of them.

    Joined they are the text.
    """
    paragraph = rf".{{1,{size}}}?\n\s*\n"
    sentences = rf".{{1,{size}}}(?:\n|(?<=[.!?])\s|(?<=[。！？])|\Z)"
    return re.findall(rf"{paragraph}|{sentences}|.{{1,{size}}}", text, re.DOTALL)


def _joined(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], count: int) -> list[int]:
    """The first `count` tokens of texts joined by an empty line, or all that there are."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count:
            break
        # A text longer than the model's context is no reason for a warning: it will be cut.
        ids += tokenizer(text + _SEPARATOR, add_special_tokens=False, verbose=False).input_ids
    return ids[:count]


def _exchanges(passages: Iterable[str], generator: random.Random) -> Iterator[Messages]:
    """Questions about a passage, each answered with the one to three that follow."""
    told = (passage for passage in passages if passage.strip())
    for passage in told:
        answer = "".join(itertools.islice(told, generator.randint(1, 3)))
        if answer:
            question = generator.choice(_QUESTIONS).format(passage.strip())
            yield _exchange(question, answer.strip())


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chat_windows(
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Iterable[Messages],
    generator: random.Random,
    start: list[int],
    length: int,
) -> Iterator[list[int]]:
    """Windows of `length` tokens, full of conversations of three exchanges on average."""
    window: list[int] = []
    messages: Messages = []
    for exchange in exchanges:
        try:
            ids = chat_tokens(tokenizer, messages + exchange)
        except UnsupportedModelError:  # something in this text has a meaning for the template
            continue
        if not window and ids[: len(start)] != start:
            ids = start + ids
        if len(window) + len(ids) >= length:
            yield (window + ids)[:length]
            window, messages = [], []
        elif generator.randrange(3) == 0:
            window, messages = window + ids, []
        else:
            messages = messages + exchange
