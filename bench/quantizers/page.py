"""What measure.py found, as a table, a page and a picture: functions of its results and of nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

COMMAND = "python bench/quantizers/measure.py --out bench/quantizers"
HEADER = ("quantizer", "block", "bits", "rms error", "worst block", "cosine, mean", "cosine, least")
AFFINE = ("int4 affine, float16", "int4 affine, float32")
# Colour says which 16 values, the line how a block's scale is kept: solid in few bits, dashed in float32.
LINES = {
    "nf4 + dq": ("#1f5fa8", "-"),
    "nf4": ("#1f5fa8", "--"),
    "fp4 + dq": ("#d1603d", "-"),
    "fp4": ("#d1603d", "--"),
    AFFINE[0]: ("#3f8f5b", "-"),
    AFFINE[1]: ("#3f8f5b", "--"),
}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['block_size']}",
        f"{row['bits']:.3f}",
        f"{row['rms_error']:.2%}",
        f"{row['worst_block']:.1%}",
        f"{row['cosine_mean']:.4f}",
        f"{row['cosine_min']:.4f}",
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A table for a page."""
    lines = [" | ".join(line) for line in (HEADER, *map(cells, rows))]
    return "\n".join(["| " + lines[0] + " |", "|---|" + "---:|" * (len(HEADER) - 1), *(f"| {x} |" for x in lines[1:])])


def columns(rows: list[dict[str, Any]]) -> str:
    """The same for a terminal."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def page(result: dict[str, Any]) -> str:
    """QUANTIZERS.md."""
    rows = result["rows"]
    find = {(row["name"], row["block_size"]): row for row in rows}
    nf4, dq, fp4, even, wide = (find[name, 64] for name in ("nf4", "nf4 + dq", "fp4", *AFFINE))
    small, small_dq, small_even = (find[name, 32] for name in ("nf4", "nf4 + dq", AFFINE[0]))
    large = find["nf4", 128]
    few, many = result["texts"]["words"]
    at_64, everything = table([row for row in rows if row["block_size"] == 64]), table(rows)
    return _wrapped(f"""# What four bits cost

`{COMMAND}` writes this page, its picture and `quantizers.json`; a test holds the three together.

Measured on the {result["matrices"]} weight matrices of {result["model"]}'s linear layers (query, key and value of a
layer lie in one), {result["weights"] / 1e6:.1f} million numbers published in float32, at QLoRA's block size of 64:

{at_64}

*bits*: per weight, everything stored counted, scales included. *rms error*: √(Σ (w' − w)² / Σ w²) over all weights.
*worst block*: the same of the block where it is largest. *cosine*: between a text's embedding by the quantized model
and by the full one, over {result["texts"]["count"]} texts of {few} to {many} words. "+ dq" is double quantization.

![Error and loss of cosine over bits per weight, for block sizes of 32 to 256](quantizers.svg)

Each line is one quantizer at block sizes 256, 128, 64 and 32, from left to right; lower and further left is better.
On the right, the mean over the texts.

## What to read from it

- **Double quantization is nearly free on average.** It takes NF4 from {nf4["bits"]:.3f} to {dq["bits"]:.3f} bits, and
the error from {nf4["rms_error"]:.2%} to {dq["rms_error"]:.2%}. A small block beside a very large one pays for it: at
block size 32 the worst block goes from {small["worst_block"]:.1%} to {small_dq["worst_block"]:.1%}.
- **Its bits are better spent on smaller blocks.** NF4 + dq at block size 32 takes {small_dq["bits"]:.3f} bits and errs
by {small_dq["rms_error"]:.2%}; NF4 with float32 scales at 128 takes {large["bits"]:.3f} and errs by
{large["rms_error"]:.2%}.
- **NF4 beats FP4 at equal bits**: {nf4["rms_error"]:.2%} to {fp4["rms_error"]:.2%}, cosine
{nf4["cosine_mean"]:.3f} to {fp4["cosine_mean"]:.3f}. Each has 16 values; NF4's lie where weights are.
- **Sixteen even steps are no worse by rms error**, if each block has its own least and largest value:
{even["rms_error"]:.2%} at {even["bits"]:.1f} bits, where NF4 has {nf4["rms_error"]:.2%}, and
{small_even["rms_error"]:.2%} to {small["rms_error"]:.2%} at block size 32. The embeddings say otherwise
({even["cosine_mean"]:.3f} to {nf4["cosine_mean"]:.3f} at 64, {small_even["cosine_mean"]:.3f} to
{small["cosine_mean"]:.3f} at 32): equal rms error is not equal harm. We have not found out why.
- **Scales in float32 are a waste for int4**: float16 gives the same errors with {wide["bits"] - even["bits"]:.1f} bit
less.

## All of it

{everything}

## What was compared, exactly

- **nf4, fp4**: `qlorag.quant.quantize`, absmax in float32, or with double quantization in 8 bits. FP4 codes follow
bitsandbytes' CPU rule (the nearest value, a tie to the lower one). Its CUDA kernel breaks ties differently, so FP4
bytes made there may differ in such places.
- **int4 affine**: per block `w' = low + scale * code`, code 0 to 15, with scale and low of the block both in float16
or both in float32, codes chosen after these are rounded. It is what GGUF's Q4_1 does at block size 32 in float16.
- No quantizer saw data, and none searched for a better scale than the plain one.
- Word embeddings, norms and biases stay in full precision, as in QLoRA. Both models compute in float32, so the cosine
shows the weights' error alone.
- The texts are the demo's questions, answers and documents, and paragraphs of Python's manual that come with Python
{result["versions"]["python"]}: English, largely technical.
- One small encoder stands for no other model. That the order of the quantizers is the same elsewhere is not shown
here.
- torch {result["versions"]["torch"]}. On other processors the last digits of the cosines may differ.
""")


def _wrapped(text: str) -> str:
    """Markdown with its paragraphs and items in lines of 120; headings, tables and pictures as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block[0] not in "#|!":
            block = "\n".join(_filled(item) for item in re.split(r"\n(?=- )", block))
        blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def _filled(item: str) -> str:
    indent = "  " if item.startswith("- ") else ""
    words = " ".join(item.split())
    return textwrap.fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def digest(result: dict[str, Any]) -> str:
    """Names the results that a picture was drawn from; it stands in the picture's metadata."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture, in the format that `path` ends in; as SVG, the same bytes from the same results and matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = {
        "RMS error of the weights, %": lambda row: 100 * row["rms_error"],
        "1 − cosine of embeddings, %": lambda row: 100 * (1 - row["cosine_mean"]),
    }
    with plt.rc_context({"svg.hashsalt": "quantizers", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
        for axes, (title, measure) in zip(panels, measures.items(), strict=True):
            for name, (colour, line) in LINES.items():
                rows = sorted((row for row in result["rows"] if row["name"] == name), key=lambda row: row["bits"])
                x, y = [row["bits"] for row in rows], [measure(row) for row in rows]
                axes.plot(x, y, line, color=colour, marker="o", markersize=4, label=name)
                if name == "nf4 + dq":
                    for row, point in zip(rows, zip(x, y, strict=True), strict=True):
                        axes.annotate(f"{row['block_size']}", point, xytext=(-6, -7), textcoords="offset points",
                                      color=colour, ha="right", fontsize=7)  # fmt: skip
            axes.set(xlabel="bits per weight", title=title, xlim=(3.85, None), ylim=(0, None))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[1].legend(frameon=False, loc="upper right")
        svg = path.suffix == ".svg"
        description = f"drawn from quantizers.json, sha256 {digest(result)}"
        figure.savefig(path, metadata={"Date": None, "Description": description} if svg else None)
        plt.close(figure)
