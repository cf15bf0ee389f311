"""What runs on a GPU today, beside its peers and the card's limits: ``make gpu-bench``.

Measured in one run: copy bandwidth and matrix rates of the card, the ring write (``fifo_write_``) beside plain torch,
and how many images per second PMB scores there with the reference backend. Results are checked beside the time. Writes
``benchmarks/results/<card>.csv``; the short table comes last. ``--device cpu`` runs the same on a CPU, to try it out.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import memad_fast
from memad_fast.models import PMB
from memad_fast.ops.fifo_write_ import reference as ring_write_in_torch

# slots, key width, value width, new rows: MemSTC-Net's batch of 8; a PatchCore-sized bank; a large memory.
RINGS = ((2048, 512, 512, 1568), (16384, 1024, 1024, 784), (1 << 20, 128, 128, 1 << 16))
SCORED = (("mvtec-texture", 20), ("mnist", 64))  # preset, batch


def milliseconds(statement: str, **names: object) -> tuple[float, float]:
    """Median and interquartile range of a statement; the timer waits for the device."""
    timer = Timer(statement, globals=names)
    measured = timer.blocked_autorange(min_run_time=0.5)
    return measured.median * 1e3, measured.iqr * 1e3


def limits(device: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    source = torch.rand(1 << 28 if device == "cuda" else 1 << 24, device=device)
    target = torch.empty_like(source)
    time, spread = milliseconds("target.copy_(source)", source=source, target=target)
    rows.append(
        {"what": "copy", "median_ms": time, "iqr_ms": spread, "rate": f"{2 * source.nbytes / time / 1e6:.0f} GB/s"}
    )
    size = 8192 if device == "cuda" else 1024
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(size, size, device=device, dtype=dtype)
        time, spread = milliseconds("square @ square", square=square)
        name = f"{dtype} product".removeprefix("torch.")
        rows.append(
            {"what": name, "median_ms": time, "iqr_ms": spread, "rate": f"{2 * size**3 / time / 1e9:.1f} TFLOP/s"}
        )
    return rows


def ring_writes(device: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for slots, width, value_width, count in RINGS:
        new_keys, new_values = torch.randn(count, width, device=device), torch.randn(count, value_width, device=device)
        rings: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        times: dict[str, tuple[float, float]] = {}
        for name, write in (("memad_fast", memad_fast.fifo_write_), ("plain torch", ring_write_in_torch)):
            ring = (
                torch.zeros(slots, width, device=device),
                torch.zeros(slots, value_width, device=device),
                torch.full((), slots - count // 2, dtype=torch.int64, device=device),
            )
            write(*ring, new_keys, new_values)
            rings[name] = tuple(part.clone() for part in ring)  # type: ignore[assignment]
            times[name] = milliseconds(
                "write(*ring, keys, values)", write=write, ring=ring, keys=new_keys, values=new_values
            )
        same = all(torch.equal(a, b) for a, b in zip(*rings.values(), strict=True))
        for name, (time, spread) in times.items():
            rows.append(
                {
                    "what": f"fifo_write_ {count} rows into {slots} x ({width} + {value_width}), {name}",
                    "median_ms": time,
                    "iqr_ms": spread,
                    "rate": f"{2 * (new_keys.nbytes + new_values.nbytes) / time / 1e6:.0f} GB/s",
                    "ratio": f"{times['plain torch'][0] / time:.2f}x plain torch",
                    "exact": str(same),
                }
            )
    return rows


def scoring(device: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for preset, batch in SCORED if device == "cuda" else (("digits", 16),):
        config = PMB.presets()[preset].config
        model = PMB(config).to(device).eval()
        images = torch.rand(batch, config.channels, config.image_size, config.image_size, device=device)
        with memad_fast.use_backend("reference"):
            time, spread = milliseconds("model.score(images)", model=model, images=images)
        rows.append(
            {
                "what": f"score PMB {preset}, batch {batch}, reference backend",
                "median_ms": time,
                "iqr_ms": spread,
                "rate": f"{batch / time * 1e3:.0f} images/s",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu-trial"
    rows = [*limits(device), *ring_writes(device), *scoring(device)]
    fields = ["what", "median_ms", "iqr_ms", "rate", "ratio", "exact"]
    if device == "cuda":
        path = Path(__file__).with_name("results") / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{card}, torch {torch.__version__}, float32 products without TF32")
    for row in rows:
        extra = ", ".join(str(row[name]) for name in ("rate", "ratio") if name in row)
        exact = "" if row.get("exact", "True") == "True" else "  WRONG RESULT"
        print(f"{row['what']:<78} {row['median_ms']:9.3f} ms  {extra}{exact}")
    if any(row.get("exact") == "False" for row in rows):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()
