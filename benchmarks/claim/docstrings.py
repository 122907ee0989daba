"""A text classification task that is on every machine with Python: which package does a docstring come from?"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing", "tkinter", "turtle", "unittest",
    "urllib", "xml",
)  # fmt: skip
MOST = 100
"""Docstrings of one package; packages have from 100 to 700."""


@dataclass(frozen=True)
class Task:
    """Tokenised sentences with their packages.

    Attributes:
        train: `(input_ids [n, length], attention_mask, labels [n])`.
        test: likewise.
        names: of the classes.
    """

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    names: tuple[str, ...]


def packages() -> tuple[str, ...]:
    """Return those of `PACKAGES` that are here: some systems leave tkinter out of their Python."""
    return tuple(package for package in PACKAGES if _files(package))


def _files(package: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted((root / package).rglob("*.py")) or [file for file in [root / f"{package}.py"] if file.exists()]


def sentences(package: str) -> list[str]:
    """Return the distinct docstrings of a package of the standard library, without the package's own name."""
    found: dict[str, None] = {}
    for file in _files(package):
        if not {"test", "tests"} & set(file.parts):
            for text in _docstrings(file):
                found.setdefault(re.sub(rf"\b{package}\b", "it", text, flags=re.IGNORECASE))
    return list(found)


def _docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= 20:
                yield text


def load(tokenizer: object, *, length: int = 24, seed: int = 0, most: int = MOST) -> Task:
    """Tokenise the sentences of all packages, and set a quarter of them aside for the test.

    Args:
        tokenizer: of transformers.
        length: tokens of each sentence; longer ones are cut.
        seed: of the split.
        most: sentences of one package.
    """
    texts, labels = [], []
    draw = torch.Generator().manual_seed(seed)
    names = packages()
    for number, package in enumerate(names):
        own = sentences(package)
        chosen = torch.randperm(len(own), generator=draw)[:most].tolist()
        texts += [own[i] for i in chosen]
        labels += [number] * len(chosen)
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")  # type: ignore[operator]
    columns = (batch["input_ids"], batch["attention_mask"], torch.tensor(labels))
    # Sentences that begin alike are one once they are cut, and must not be in both parts.
    first = list({tuple(row): i for i, row in reversed(list(enumerate(batch["input_ids"].tolist())))}.values())
    order = torch.tensor(sorted(first))[torch.randperm(len(first), generator=draw)]
    cut = len(order) * 3 // 4
    train, test = (tuple(column[part] for column in columns) for part in (order[:cut], order[cut:]))
    return Task(train, test, names)
