"""One word for one thing: words that mean two things here, or that only this project used, stay out of the tree.

A line is allowed if it matches a pattern of `allowed`, or if its file matches a pattern of `files`.
"""

import io
import re
import subprocess
import tokenize
from dataclasses import dataclass
from fnmatch import fnmatch

import pytest

from tests.conftest import ROOT

TEXT = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.html", "*.ipynb", "*.cpp", "*.h", "Makefile", ".ci/run")
EXEMPT = ("CHANGELOG.md", "tests/unit/test_words.py")  # they name the old words on purpose
SIMD = (
    "pipeline/ops/*",
    "tests/unit/ops/*",
    "benchmarks/scan.py",
    "benchmarks/gpu_*.py",
    "docs/scan.md",
    "docs/kernels.md",
    "docs/efficientvim.md",
)
NOTHING = r"(?!)"


@dataclass(frozen=True)
class Word:
    """A pattern that must not be found, and what to write. With a capital in it, capitals matter."""

    pattern: str
    instead: str
    allowed: str = NOTHING
    files: tuple[str, ...] = ()

    def found(self, line: str) -> bool:
        flags = 0 if any(letter.isupper() for letter in self.pattern) else re.IGNORECASE
        return re.search(self.pattern, line, flags) is not None


WORDS = (
    Word(r"\bjudg(e[sd]?|ing)\b", "evaluate, evaluator, evaluation"),
    Word(r"\bgaller(y|ies)\b", "visualize"),
    Word(r"\banatom(y|ies)\b", "profile"),
    Word(r"\b(shortages|refusals)\.py\b", "preflight.py, limits.py"),
    Word(r"\bsights?\b", "target layers"),
    Word(r"\bfronts?\b", "Pareto front", r"(?i)pareto"),
    Word(r"\bworking[ _-]cop(y|ies)\b", "inference copy"),
    # The old config key is refused with its new name.
    Word(r"\b_?lanes?\b", "virtual reader, reader", r"virtual_readers|data\.loader\.lanes", SIMD),
    # DeepSpeed's own name; CSS; an option of `convert`.
    Word(
        r"\b_?positions?\b",
        "sample index, data step, position embedding; pixel, patch or token; offset",
        r"(?i)position[ _-]embedding|grad_position|position: sticky|--cls-position",
    ),
    # The old config key is refused with its new name.
    Word(
        r"\bprobes?\b",
        "fingerprint, linear probe, self-test",
        r'(?i)linear[ _-]probes?|"probe": "linear_probe"|"probe\.',
    ),
    Word(r"\btroubles?\b", "anomaly, problem"),
    Word(r"\bhouses?\b", "package, project"),
    # Rounding down.
    Word(r"\bfloors?\b", "layer", r"\bfloor\("),
    Word(r"\brooms?\b", "package, module; space"),
    Word(r"\bwhoever\b", "say who"),
    Word(r"\bgoes on before\b", "waits until"),
    Word(r"\bwhat (stands|is left standing)\b", "say what is there"),
    Word(r"\b((un)?labelled|validation|held-out) parts?\b", "subset"),
    # Servers and SLURM answer; models predict.
    Word(r"\banswers?\b", "prediction, output, logits", files=("*storage*", "*slurm*", "launchers/*", "tests/*")),
    Word(r"\brequirements-(?!cu|cpu)\w+\.txt", "an extra of pyproject.toml: pip install 'visionmamba-pipeline[onnx]'"),
    Word(r'("""|# |//! ?|// )Of\b(?! course)', "a whole sentence, or a noun phrase that stands alone"),
    Word(r"\S  +(#|//) (of|that|whose)\b", "a comment that can be read without the code before it"),
)
# Names in code that were given up, with what replaced them.
NAMES = {
    "Setting": "StageContext",
    "Judge": "Evaluator",
    "WorkingCopy": "InferenceCopy",
    "Trouble": "Anomaly",
    "Done": "StepResult",
    "Answers": "Predictions",
    "Anatomy": "Profile",
    "probe_sha256": "fingerprint_sha256",
}


def _files() -> list[str]:
    done = subprocess.run(["git", "ls-files", "--", *TEXT], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if name not in EXEMPT and (ROOT / name).is_file()]


FILES = {name: (ROOT / name).read_text().splitlines() for name in _files()}


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.instead.split(",")[0].replace(" ", "-"))
def test_a_word_with_two_meanings_or_of_this_project_alone_is_not_used(word: Word) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, lines in FILES.items()
        if not any(fnmatch(name, glob) for glob in word.files)
        for number, line in enumerate(lines, 1)
        if word.found(line) and not re.search(word.allowed, line)
    ]
    assert not found, f"write {word.instead} instead:\n" + "\n".join(found)


def test_names_that_were_given_up_are_not_used() -> None:
    found = [
        f"{name}:{token.start[0]}: {token.string}, now {NAMES[token.string]}"
        for name, lines in FILES.items()
        if name.endswith(".py")
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
        if token.type == tokenize.NAME and token.string in NAMES
    ]
    assert not found, "\n".join(found)


def test_every_allowance_is_used() -> None:
    """An allowance that allows nothing is removed."""
    lines = [line for lines in FILES.values() for line in lines]
    used = [any(word.found(line) and re.search(word.allowed, line) for line in lines) for word in WORDS]
    assert [
        word.pattern for word, is_used in zip(WORDS, used, strict=True) if not is_used and word.allowed != NOTHING
    ] == []
