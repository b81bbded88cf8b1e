"""Read disassembled GPU code: which instructions a warp issues in a loop.

`nvdisasm -c` prints machine code with labels. This file cuts it into basic blocks, finds the loops (a block that jumps back
to one that dominates it), and takes the heaviest path through the body of a loop. So of two alternatives, for example the
two directions of a scan, the larger one counts, and both never do. Instructions under a false predicate count too, because
they occupy their slot. Branches for diverged warps (BRA.DIV) are not followed: the kernels keep warps together.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
_TARGET = re.compile(r"`\((\.[\w$.]+)\)")


@dataclass
class Block:
    """Instructions without a branch between them."""

    operations: Counter[str] = field(default_factory=Counter)
    next: list[int] = field(default_factory=list)


def kernels(text: str, wanted: str = "") -> dict[str, list[Block]]:
    """Return the blocks of each kernel whose name contains `wanted`, in the order of the code; the first is the entry."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.split(r'[\s,"]', section, maxsplit=1)[0]
        if wanted in name:
            found[name] = _blocks(section)
    return found


def _blocks(section: str) -> list[Block]:
    lines: list[tuple[str, str, bool, str]] = []  # (label, operation, whether predicated, target)
    label = ""
    for line in section.splitlines():
        if mark := re.match(r"(\.L_\w+):", line):
            label = mark.group(1)
            lines.append((label, "", False, ""))
        elif found := _LINE.match(line):
            predicate, operation, rest = found.groups()
            target = _TARGET.search(rest)
            full = operation + rest.split()[0] if rest.startswith(".") else operation
            lines.append(("", full, predicate is not None and predicate != "PT", target.group(1) if target else ""))
    blocks, of_label = [Block()], {}
    pending: list[tuple[int, str]] = []
    ended = False
    for mark, operation, predicated, target in lines:
        if mark or ended:
            blocks.append(Block())
            if not ended or ended == "falls":
                blocks[-2].next.append(len(blocks) - 1)
            ended = False
        if mark:
            of_label[mark] = len(blocks) - 1
            continue
        blocks[-1].operations[operation] += 1
        base = operation.split(".")[0]
        if base in ("BRA", "JMP", "CALL") and target in ("",) and base != "BRA":
            continue
        if base in ("BRA", "JMP") or (base == "CALL" and target.startswith(".L_x")):
            if "DIV" not in operation and "CONV" not in operation:
                pending.append((len(blocks) - 1, target))
                ended = "falls" if predicated else "jumps"
        elif base in ("EXIT", "RET"):
            ended = "falls" if predicated else "jumps"
    for number, target in pending:
        if target in of_label:
            blocks[number].next.append(of_label[target])
    return blocks


@dataclass
class Loop:
    """A loop and those directly inside it."""

    header: int
    body: set[int]
    inner: list["Loop"] = field(default_factory=list)


def loops(blocks: list[Block]) -> list[Loop]:
    """Return the outermost loops, with the others nested in them."""
    reached, waiting = {0}, [0]  # what only a branch for diverged warps leads to is left out
    while waiting:
        new = set(blocks[waiting.pop()].next) - reached
        reached |= new
        waiting += new
    before: list[list[int]] = [[] for _ in blocks]
    for number in sorted(reached):
        for successor in blocks[number].next:
            before[successor].append(number)
    everything = set(range(len(blocks)))
    dominators = [everything.copy() for _ in blocks]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            ways = [dominators[p] for p in before[number]]
            own = {number} | set.intersection(*ways)
            if own != dominators[number]:
                dominators[number], changed = own, True
    bodies: dict[int, set[int]] = {}
    for number in sorted(reached):
        for header in blocks[number].next:
            if header in dominators[number]:
                body, stack = bodies.setdefault(header, {header}), [number]
                while stack:
                    at = stack.pop()
                    if at not in body:
                        body.add(at)
                        stack += before[at]
    found = sorted((Loop(header, body) for header, body in bodies.items()), key=lambda loop: len(loop.body))
    outermost = []
    for i, loop in enumerate(found):
        parent = next((other for other in found[i + 1 :] if loop.header in other.body), None)
        (parent.inner if parent else outermost).append(loop)
    return outermost


def heaviest_path(blocks: list[Block], loop: Loop, repeats: dict[int, int]) -> Counter[str]:
    """Return what a warp issues in one iteration of a loop.

    Args:
        blocks: The kernel.
        loop: One of its loops.
        repeats: How often an inner loop repeats, by its header; once if absent.
    """
    owner = {number: inner for inner in loop.inner for number in inner.body}
    weights: dict[int, Counter[str]] = {}
    for inner in loop.inner:
        once = heaviest_path(blocks, inner, repeats)
        weights[inner.header] = Counter({k: v * repeats.get(inner.header, 1) for k, v in once.items()})

    def node(number: int) -> int:
        return owner[number].header if number in owner else number

    successors: dict[int, set[int]] = {}
    for number in loop.body:
        at = node(number)
        ways = successors.setdefault(at, set())
        ways |= {node(n) for n in blocks[number].next if n in loop.body and n != loop.header and node(n) != at}
    best: dict[int, Counter[str]] = {}
    order: list[int] = []
    seen: set[int] = set()
    stack: list[tuple[int, bool]] = [(node(loop.header), False)]
    while stack:  # postorder without recursion
        at, done = stack.pop()
        if done:
            order.append(at)
        elif at not in seen:
            seen.add(at)
            stack.append((at, True))
            stack += [(n, False) for n in successors[at] if n not in seen]
    for at in order:
        own = weights.get(at, blocks[at].operations)
        rest = max((best[n] for n in successors[at] if n in best), key=lambda c: c.total(), default=Counter())
        best[at] = own + rest
    return best[node(loop.header)]
