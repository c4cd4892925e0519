"""Find inner loops that keep vectors on the stack, in a library's disassembly."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

MULTIPLY_ADD = re.compile(r"vfn?madd\d+ps|vpdpbusd|vpmaddubsw|vdpbf16ps")
VECTOR = re.compile(r"%([xyz]mm)\d")
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)\b")
END = re.compile(r"(?:notrack )?jmp\b|(?:bnd |rep |repz )?ret|ud2|hlt")
COPY = re.compile(r"(?:lea\s+.*\(%(\w+).*\)|mov\s+%(\w+)),%(\w+)$")  # source of a lea, or of a mov; destination
WRITE = re.compile(r"(?!push|cmp|test|add|sub|and)\S+\s+(?:.*,)?%(r\w+)$")  # to move a pointer leaves it in its array


@dataclass(frozen=True)
class Loop:
    """An innermost loop with multiply-adds; `width` is its widest register: xmm, ymm or zmm."""

    function: str
    width: str
    spills: tuple[str, ...]  # instructions that move a vector from or to the stack


def inner_loops(library: Path) -> list[Loop]:
    """Every innermost loop with a multiply-add, of all functions."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [loop for function in text.split("\n\n") for loop in _loops_of(function)]


def _loops_of(function: str) -> list[Loop]:
    name = re.search(r"^[0-9a-f]+ <(.*)>:$", function, re.MULTILINE)
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*?)\s*$", function, re.MULTILINE)
    if not name or not lines:
        return []
    code = [text for _, text in lines]
    bodies = _natural_loops(code, {int(address, 16): i for i, (address, _) in enumerate(lines)})
    loops = []
    for head, body in bodies.items():
        texts = [code[i] for i in sorted(body)]
        outer = any(other in body and other != head for other in bodies)
        if outer or not any(MULTIPLY_ADD.match(text) for text in texts):
            continue
        stack = "|".join(_stack_pointers(code[:head]))
        spills = tuple(text for text in texts if VECTOR.search(text) and re.search(rf"\(%({stack})\b", text))
        loops.append(Loop(name[1], max(VECTOR.findall(" ".join(texts))), spills))
    return loops


def _natural_loops(code: list[str], at: dict[int, int]) -> dict[int, set[int]]:
    """First instruction of each loop -> all its instructions; `at`: address -> place in the code."""
    jumps = {
        i: at[int(jump[1], 16)] for i, text in enumerate(code) if (jump := JUMP.match(text)) and int(jump[1], 16) in at
    }
    before: list[list[int]] = [[] for _ in code]
    for i, text in enumerate(code):
        if i in jumps:
            before[jumps[i]].append(i)
        if i + 1 < len(code) and not END.match(text):
            before[i + 1].append(i)
    loops: dict[int, set[int]] = {}
    for head, last in ((head, last) for head, places in enumerate(before) if len(places) > 1 for last in places):
        body, left = {last}, [last] * (last != head)
        while left:
            new = set(before[left.pop()]) - body
            body |= new
            left += new - {head}
        # A loop is entered through its head only: the function's start is not reached backwards without passing it.
        # So a jump back from a rare block, which compilers move behind the end, makes no loop.
        if head in body and (0 not in body or head == 0):
            loops[head] = loops.get(head, set()) | body
    return loops


def _stack_pointers(before: list[str]) -> set[str]:
    """The registers that hold an address on the stack after these instructions."""
    found = {"rsp"}
    for text in before:
        copy, write = COPY.match(text), WRITE.match(text)
        if copy and (copy[1] or copy[2]) in found:
            found.add(copy[3])
        elif write and write[1] != "rsp":
            found.discard(write[1])
    return found
