"""The verbs `pull`, `fuse`, `export` and `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hub.assemble import assemble, pick_dtype
from ..hub.export import export_bnb
from ..hub.fuse import fuse
from ..hub.pull import KNOWN_MODELS, pull
from ..inspection.folder import inspect_backends, inspect_folder
from .display import Display, size
from .train import add_model_flags


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = verbs.add_parser("pull", help="fetch a model", formatter_class=formatter)
    p.set_defaults(run=run_pull)
    p.add_argument("name", help=f"{', '.join(KNOWN_MODELS)}, or org/name of the Hugging Face Hub")

    p = verbs.add_parser("fuse", help="write an adapter into its base model", formatter_class=formatter)
    p.set_defaults(run=run_fuse)
    add_model_flags(p, dtype="bfloat16")
    p.add_argument("--adapter-path", required=True, help="the adapter")
    p.add_argument("--save-path", required=True, help="folder for the fused model; must not exist")
    p.add_argument(
        "--de-quantize",
        action="store_true",
        help="accepted for mlx-lm's sake: a fused model is always saved dense, from the weights it was trained on",
    )

    p = verbs.add_parser("export", help="write a model as other programs read it", formatter_class=formatter)
    p.set_defaults(run=run_export)
    p.add_argument("--model", required=True, help="a model folder, or a name that `qlorag pull` knows")
    p.add_argument("--format", choices=["bnb"], required=True, help="bnb: a folder for transformers and bitsandbytes")
    p.add_argument("--save-path", required=True, help="folder for the exported model; must not exist")
    p.add_argument("--quantize", choices=["nf4", "fp4"], default="nf4", help="the 4-bit code of the projections")
    p.add_argument("--block-size", type=int, default=64, help="weights that share a scale")
    p.add_argument("--no-double-quant", action="store_true", help="keep scales in float32: 4.5 bits instead of 4.127")
    p.add_argument("--dtype", default="bfloat16", help="of what stays dense: bfloat16, float16, float32")

    p = verbs.add_parser("inspect", help="say what a folder holds", formatter_class=formatter)
    p.set_defaults(run=run_inspect)
    p.add_argument("path", nargs="?", help="folder of a model, an adapter, a store or data; or a known model's name")
    p.add_argument("--quantize", choices=["nf4", "fp4"], help="also load a model in 4 bits and measure it")
    p.add_argument("--tensors", action="store_true", help="list every tensor with its bits and, if known, its error")
    p.add_argument("--model", help="count a data folder's tokens with this model's tokenizer")
    p.add_argument("--backends", action="store_true", help="show which kernels this machine can run")


def run_pull(args: argparse.Namespace, display: Display) -> int:
    """`qlorag pull`."""
    folder = pull(args.name)
    display.say(folder)
    display.result({"folder": str(folder)})
    return 0


def run_fuse(args: argparse.Namespace, display: Display) -> int:
    """`qlorag fuse`."""
    target = _free(args.save_path)
    it = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    report = fuse(it, target, dtype=pick_dtype(args.dtype))
    saved = sum(p.stat().st_size for p in target.iterdir())
    against = f"decoded {it.quantize} weights" if it.quantize else "dense weights"
    display.say(report)
    display.say(f"{target}: {size(saved)}, merged onto the {against}")
    display.result({"save_path": str(target), "quantize": it.quantize, "layers": [vars(x) for x in report.layers]})
    return 0


def run_export(args: argparse.Namespace, display: Display) -> int:
    """`qlorag export`."""
    report = export_bnb(
        args.model,
        _free(args.save_path),
        quantize=args.quantize,
        block_size=args.block_size,
        double_quant=not args.no_double_quant,
        dtype=pick_dtype(args.dtype),
    )
    display.say(
        f"{report.folder}: {size(report.nbytes)}, {report.layers} layers in 4 bits, "
        f"{report.bits_per_weight:.3f} bits per weight"
    )
    display.result({**vars(report), "folder": str(report.folder)})
    return 0


def _free(save_path: str) -> Path:
    """The folder to write; refused before any work is done for it if something is there."""
    target = Path(save_path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--save-path {target}: already there and not empty: choose another folder or remove it")
    return target


def run_inspect(args: argparse.Namespace, display: Display) -> int:
    """`qlorag inspect`."""
    if not args.path and not args.backends:
        raise UsageError("inspect: give a folder, or --backends")
    result: dict[str, Any] = {}
    if args.backends:
        result["backends"] = inspect_backends(display)
    if args.path:
        result |= inspect_folder(args.path, display, quantize=args.quantize, model=args.model, tensors=args.tensors)
    display.result(result)
    return 0
