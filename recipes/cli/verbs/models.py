"""The verbs `pull`, `fuse` and `export`."""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import UsageError
from ...hub.known_models import KNOWN_MODELS
from ..display import Display, size
from ..flags import add_model_flags, add_verb


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    p = add_verb(verbs, "pull", run_pull)
    known = ", ".join(f"{name} ({model.about})" for name, model in KNOWN_MODELS.items())
    p.add_argument("name", help=f"{known}, or org/name of the Hugging Face Hub")

    p = add_verb(verbs, "fuse", run_fuse)
    add_model_flags(p, required=False, dtype="bfloat16")
    p.add_argument("--adapter-path", required=True, help="the adapter")
    p.add_argument("--save-path", required=True, help="folder for the fused model; must not exist")
    p.add_argument(
        "--de-quantize",
        "--dequantize",
        action="store_true",
        help="changes nothing, accepted as mlx-lm has it: a fused model is always saved dense",
    )

    p.add_argument(
        "--trust-base", action="store_true", help="fuse although the adapter names another base than --model"
    )

    p = add_verb(verbs, "export", run_export)
    p.add_argument("--model", required=True, help="a model folder, or a name that `qlorag pull` knows")
    p.add_argument("--format", choices=["bnb"], required=True, help="bnb: a folder for transformers and bitsandbytes")
    p.add_argument("--save-path", required=True, help="folder for the exported model; must not exist")
    p.add_argument("--quantize", choices=["nf4", "fp4"], default="nf4", help="the 4-bit code of the projections")
    p.add_argument("--block-size", type=int, default=64, help="weights that share a scale")
    p.add_argument("--no-double-quant", action="store_true", help="keep scales in float32: 4.5 bits instead of 4.127")
    p.add_argument("--dtype", default="bfloat16", help="of what stays dense: bfloat16, float16, float32")


def run_pull(args: argparse.Namespace, display: Display) -> int:
    """`qlorag pull`."""
    from ...hub.pull import pull

    folder = pull(args.name)
    display.say(folder)
    display.result({"folder": str(folder)})
    return 0


def run_fuse(args: argparse.Namespace, display: Display) -> int:
    """`qlorag fuse`."""
    from ....models.files.folders import check_free
    from ...hub.assemble import assemble, pick_dtype
    from ...hub.fuse import fuse

    target = check_free(args.save_path)  # before any work is done for it
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    if loaded.doubt and not args.trust_base:
        raise UsageError(f"{loaded.doubt}: name the right base, or fuse them all the same with --trust-base")
    report = fuse(loaded, target, dtype=pick_dtype(args.dtype))
    saved = sum(p.stat().st_size for p in target.iterdir())
    against = f"decoded {loaded.quantize} weights" if loaded.quantize else "dense weights"
    display.say(str(report))
    if lost := [layer for layer in report.layers if layer.rounding > 1]:
        worst = max(lost, key=lambda layer: layer.rounding)
        display.say(
            f"note: in {len(lost)} of {len(report.layers)} layers rounding to {args.dtype} changes the weight more "
            f"than the update does ({worst.rounding:.2g} times as much in {worst.path}): --dtype float32 keeps it",
            style="yellow",
        )
    display.say(f"{target}: {size(saved)}, merged onto the {against}")
    display.result({"save_path": str(target), "quantize": loaded.quantize, "layers": [vars(x) for x in report.layers]})
    return 0


def run_export(args: argparse.Namespace, display: Display) -> int:
    """`qlorag export`."""
    from ....models.files.folders import check_free
    from ...hub.assemble import pick_dtype
    from ...hub.export import export_bnb

    report = export_bnb(
        args.model,
        check_free(args.save_path),  # before any work is done for it
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
