"""What `sparsec bench` prints: ratios first, then times, then what they hold for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sparsec import machine
from sparsec.benchmark import FP32, OURS, best_fp32, ratios, size_of, title
from sparsec.show import out

Row = Mapping[str, Any]


def show(result: Mapping[str, Any]) -> None:
    """Tables of the whole model and of its layers, the best peer, and the machine."""
    out.print(f"[bold]{title(result)}[/]: times faster than ...")
    out.print(_table(result["speed"], ("inputs",)))
    out.print(_verdict(result["speed"]))
    if layers := result.get("layers"):
        timed = [row for row in layers if "seconds" in row]
        if timed:
            out.print("[bold]One product[/], every call on another copy of the weight: times faster than ...")
            pattern = ("pattern",) if len(result["patterns"]) > 1 else ()
            out.print(_table(timed, ("rows x cols", *pattern, "sites", "tokens")))
            out.print(_verdict(timed))
        for row in _once(layers):
            out.print(f"{row['rows']}x{row['cols']} {row['pattern']} is not timed: {row['reason']}")
    for name, why in result["unavailable"].items():
        out.print(f"[yellow]{name} cannot run here[/]: {why}")
    out.print(f"largest difference from the dense outputs: {_differences(result['differences'])}")
    threads = [row["threads"] for row in result["speed"]]
    out.print(machine.line(result["machine"], threads))
    if caution := machine.caution(result["machine"], threads):
        out.print(f"[yellow]Caution[/]: {caution}")


def ceilings(found: Mapping[str, Any]) -> None:
    """What a GPU can do at most, and how near its kernels come."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{found['gpu']}, {found['basis']}")
    table.add_column("", justify="right")
    for key, words in _FLOPS.items():
        if found[key]:  # else not known
            table.add_row(words, f"{found[key] / 1e12:.0f} Tflop/s")
    for key, words in _BYTES.items():
        table.add_row(words, f"{found[key] / 1e12:.2f} TB/s")
    for m, rate in found["gather_bytes"].items():
        table.add_row(f"shared memory, lines 4 of {m}", f"{rate / 1e12:.1f} TB/s")
    table.add_row("smallest kernel in a CUDA graph", f"{found['launch_seconds'] * 1e6:.1f} us")
    for kernel, share in found["reached"].items():
        table.add_row(f"share of the roofline, {kernel}", f"{share:.2f}")
    out.print(table)


_FLOPS = {
    "dense_flops": "dense product",
    "sparse_flops": "sparse tensor cores, as gathered",
    "mma_flops": "the same instruction, not sparse",
    "two_of_four_flops": "2:4 of torch, as dense",
}
_BYTES = {
    "two_of_four_bytes": "2:4 of torch, from memory",
    "l2_bytes": "L2 cache",
    "memory_bytes": "memory",
}


def _table(rows: Sequence[Row], what: Sequence[str]) -> Table:
    names = [name for name in rows[0]["seconds"] if name != OURS]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (
        *what,
        "threads",
        *(_header(name) for name in names),
        *(f"{_header(n)}\nms" for n in (OURS, *names)),
    ):
        table.add_column(column, justify="left" if column == "pattern" else "right", no_wrap=True)
    for row in rows:
        best = min(ratios(row).items(), key=lambda entry: entry[1])[0]  # the peer that is hardest to beat
        bold = [f"[bold]{one:.2f}x[/]" if name == best else f"{one:.2f}x" for name, one in ratios(row).items()]
        times = [_milliseconds(row["seconds"][name]) for name in (OURS, *names)]
        table.add_row(*(_cell(row, column) for column in what), str(row["threads"]), *bold, *times)
    clocks = dict.fromkeys(
        f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}: {row['clock']}" for row in rows
    )
    table.caption = f"{'; '.join(clocks)}; fastest tenth of interleaved runs; bold: the best peer"
    table.caption_justify = "left"
    return table


def _header(name: str) -> str:
    return name.replace("-", "\n").replace("onnxruntime", "onnx\nruntime")  # narrow columns: there are many


def _cell(row: Row, column: str) -> str:
    if column == "inputs":
        return size_of(row)
    return f"{row['rows']}x{row['cols']}" if column == "rows x cols" else str(row[column])


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-3 else f"{1e3 * seconds:.4f}"


def _verdict(rows: Sequence[Row]) -> str:
    """Which dense fp32 peer is the best, and how the kernels compare with the best of every row, and with int8."""
    found = best_fp32(rows)
    said = []
    if found:
        name, times, mean = found
        said.append(
            f"The best dense fp32 is [bold]{name}[/] in {times} of {len(rows)} rows; against the best of every row the "
            f"kernels are [bold]{mean:.2f}x[/] as fast (geometric mean)"
        )
    others = [name for name in rows[0]["seconds"] if name != OURS and name not in FP32]
    for name in others:
        mean = math.exp(sum(math.log(ratios(row)[name]) for row in rows) / len(rows))
        said.append(f"against {name} {mean:.2f}x")
    return "; ".join(said) + "."


def _once(layers: Sequence[Row]) -> list[Row]:
    """One row for each layer without a kernel."""
    return list({(row["rows"], row["cols"], row["pattern"]): row for row in layers if "reason" in row}.values())


def _differences(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {one:.0e}" for name, one in differences.items() if name != "dense")
