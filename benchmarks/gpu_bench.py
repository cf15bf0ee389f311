"""The H200 table of PERFORMANCE: every op on the GPU beside its peers and the card's limits. ``make gpu-bench``.

The cases are those of the ``bench_*.py`` files at a GPU's sizes, the measuring is in ``gpu_harness.py``. Ours runs by
every backend that has a kernel. Products of the peers are in float32 with TF32 off; the one in TF32 says so and is not
judged against. It ends within ten minutes: writes ``benchmarks/results/<card>.csv`` and ``.md`` with all rows, prints a
short table last, and exits with 1 if a call failed or a result of ours was wrong.

    python benchmarks/gpu_bench.py --device cpu --tiny    # tries the program out, on small shapes
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_bank_attention
import bench_end_to_end
import bench_fifo_write_
import bench_gumbel_topk
import bench_histogram_correction
import bench_nearest_keys
import bench_ssim
import bench_stcm_lookup
import torch
import torch.nn.functional as F
from gpu_harness import Card, Run, TimedReads
from harness import Case, Provider, eager, float64, float64_with_gradient, largest_error, ours, with_gradient
from report import Comparison, Result, comparisons, judgements, save, table
from torch import Tensor

import memad_fast
from memad_fast import _triton
from memad_fast.models import PMB
from memad_fast.ops.bank_attention import reference as attention_in_torch
from memad_fast.ops.histogram_correction import reference as correction_in_torch

# The largest [queries, keys] block of a peer that stores one: 4 GiB in float32.
BLOCK = 1 << 30
# Of a float64 check.
CHECK_BLOCK = 1 << 28


def backends_of(device: str, op: str) -> list[str]:
    """Those that serve an op there, the one that serves it by default first."""
    if device == "cpu":
        return ["cpu"]
    return [
        *(["cuda"] if _triton.has_compiled_kernel(op) else []),
        *(["triton"] if _triton.has_triton_kernel(op) else []),
    ]


def on_device(device: str, op: str, cases: Iterable[Case], **changes: Any) -> list[Case]:
    """The cases with ours by each backend that serves ``op``."""
    found = []
    for case in cases:
        ours_by = [
            replace(provider, name=f"{provider.name} ({backend})", backend=backend)
            for provider in case.providers
            if provider.is_ours
            for backend in backends_of(device, op) or ["triton"]
        ]
        peers = [provider for provider in case.providers if not provider.is_ours]
        found.append(replace(case, providers=[*ours_by, *peers], **changes))
    return found


# --- nearest_keys -------------------------------------------------------------------------------------------------


def in_chunks(search: Callable[..., tuple[Tensor, Tensor]], query: Tensor, keys: Tensor, *more: Tensor) -> Any:
    """A search that stores its scores, for so many queries at a time that they fit."""
    size = max(1, BLOCK // len(keys))
    if len(query) <= size:
        return search(query, keys, *more)
    parts = [search(part, keys, *more) for part in query.split(size)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def with_half_squares(search: Callable) -> Callable[..., Callable[[], Any]]:
    """What can be computed once for the keys is, as in prepared keys."""
    return lambda query, keys: partial(in_chunks, search, query, keys, keys.square().sum(dim=1) / 2)


def compiled_product(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    torch._dynamo.reset()
    search = torch.compile(bench_nearest_keys.product_argmin, dynamic=False)
    return with_half_squares(search)(query, keys)


def fused_tf32(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    from fused_tf32 import assign

    half_squares = keys.square().sum(dim=1) / 2
    return lambda: assign(query, keys, half_squares)


def float64_search(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest by float64 products, then Σ(q−k)² in float64 of the four best."""
    rows = keys.double()
    squares = rows.square().sum(dim=1) / 2
    best = []
    for part in query.split(max(1, CHECK_BLOCK // len(keys))):
        scores = torch.addmm(squares, part.double(), rows.T, alpha=-1.0)
        near = scores.topk(min(4, len(keys)), largest=False).indices.sort(dim=1).values
        distances = (part.double()[:, None] - rows[near]).square().sum(dim=2)
        ordered, order = distances.sort(dim=1, stable=True)
        best.append((ordered[:, :1], near.gather(1, order[:, :1])))
    return torch.cat([part[0] for part in best]), torch.cat([part[1] for part in best])


def nearest_keys_cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(25_088, 16_384, 1024), (65_536, 2048, 512), (8 << 20, 1024, 128), (64, 10_000_000, 128)]
    not_exact = Provider("fused TF32", fused_tf32, precision="TF32, not exact")
    providers = [
        Provider("ours, prepared", bench_nearest_keys.prepared, is_ours=True),
        ours(memad_fast.nearest_keys),
        Provider("cdist+argmin", lambda query, keys: partial(in_chunks, bench_nearest_keys.cdist_argmin, query, keys)),
        Provider("mm+argmin", with_half_squares(bench_nearest_keys.product_argmin)),
        Provider("torch.compile(mm+argmin)", compiled_product),
        *([not_exact] if device == "cuda" else []),
    ]
    cases = []
    for count, rows, dim in [(30, 50, 64)] if tiny else shapes:
        case = Case(
            f"{count}x{rows}x{dim}",
            inputs=lambda count=count, rows=rows, dim=dim: (torch.randn(count, dim), torch.randn(rows, dim)),
            providers=providers,
            expected=float64_search,
            tolerance=1e-6,
            error=bench_nearest_keys.distance_error,
            wrong=bench_nearest_keys.wrong_indices,
            flops=2.0 * count * rows * dim,
            bytes=(4.0 * count + rows) * dim,
            rate="bf16",
            target=5.0,
        )
        cases += on_device(device, "nearest_keys", [case])
    return cases


def stcm_lookup_cases(device: str, tiny: bool) -> list[Case]:
    def expected(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances, indices = float64_search(query, keys)
        return values[indices[:, 0]], distances[:, 0], indices[:, 0]

    counts = (20,) if tiny else (1568, 25_088)
    cases = [replace(bench_stcm_lookup.case(count), expected=expected, rate="bf16") for count in counts]
    return on_device(device, "stcm_lookup", cases)


# --- the other ops ------------------------------------------------------------------------------------------------


def attention_of_torch(query: Tensor, bank: Tensor) -> Tensor:
    """Where nothing is shrunk, the read is scaled dot-product attention."""
    keys = F.normalize(bank, dim=-1).expand(query.shape[0], -1, -1, -1)
    values = bank.expand(query.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(F.normalize(query, dim=-1), keys, values, scale=1.0)


def bank_attention_cases(device: str, tiny: bool) -> list[Case]:
    levels = [(2, 4, 8, 10)] if tiny else bench_bank_attention.LEVELS
    cases = []
    for batch in (2,) if tiny else (20, 256):
        for case in (case for level in levels for case in bench_bank_attention.cases(batch, *level)):
            is_forward = case.name.endswith("forward")
            mean_of = f"{'forward' if is_forward else 'forward+backward'}, batch {batch}"
            cases.append(replace(case, mean_of=mean_of, target=3.0 if is_forward else 2.0))
    for partitions, channels, width, items in levels[-2:]:
        rows = 20 * partitions * channels
        cases.append(
            Case(
                f"20x{partitions}x{channels}x{width}, M {items} forward, none shrunk",
                inputs=partial(bench_bank_attention.strips, 20, partitions, channels, width, items),
                providers=[
                    ours(partial(memad_fast.bank_attention, threshold=0.0, shrink="none")),
                    eager("SDPA", attention_of_torch),
                ],
                expected=float64(partial(attention_in_torch, threshold=0.0, shrink="none")),
                tolerance=1e-5,
                flops=4 * rows * items * width,
                bytes=4 * (2 * rows * width + partitions * items * width),
            )
        )
    return on_device(device, "bank_attention", cases)


def gumbel_topk_cases(device: str, tiny: bool) -> list[Case]:
    cases = bench_gumbel_topk.cases(*((20, 70, 8, 3) if tiny else (65_536, 4096, 64, 8)))
    cases[0] = replace(cases[0], target=5.0)
    return on_device(device, "gumbel_topk", cases)


def histogram_correction_cases(device: str, tiny: bool) -> list[Case]:
    forms = bench_histogram_correction.PROVIDERS
    cases = []
    for shape in [(2, 9, 9)] if tiny else [(256, 256, 256), (16, 2048, 2048)]:
        cases += [
            bench_histogram_correction.case("forward", shape, forms, float64(correction_in_torch), 2, target=20.0),
            bench_histogram_correction.case(
                "forward+backward", shape, [with_gradient(form) for form in forms],
                float64_with_gradient(correction_in_torch), 5,
            ),
        ]  # fmt: skip
    return on_device(device, "histogram_correction", cases)


def ssim_cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(1, 1, 12, 12)] if tiny else [(20, 1, 128, 128), (16, 3, 1024, 1024)]
    cases = [case for shape in shapes for case in bench_ssim.cases(shape)]
    # The target is against fused-ssim; where it is not installed there is none.
    has_fused = importlib.util.find_spec("fused_ssim") is not None
    return on_device(device, "ssim_loss", cases, target=1.5 if has_fused else None)


def fifo_write_cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(20, 7, 8)] if tiny else [(2048, 1568, 512), (16_384, 784, 1024), (10_000_000, 1 << 20, 128)]
    return on_device(device, "fifo_write_", [bench_fifo_write_.case(*shape) for shape in shapes])


# --- scoring ------------------------------------------------------------------------------------------------------


def pmb_step(event: Callable[[], Any], backend: str) -> Callable[..., TimedReads]:
    """Scores of a batch; the reads are those of the model's memories."""

    def prepare(model: PMB, images: Tensor) -> TimedReads:
        memories = [memory.forward for memory in model.memories]

        def run(read: Callable) -> tuple[Tensor, Tensor]:
            for memory, forward in zip(model.memories, memories, strict=True):
                memory.forward = partial(read, forward)
            try:
                with memad_fast.use_backend(backend or None):
                    scores = model.score(images)
            finally:
                for memory, forward in zip(model.memories, memories, strict=True):
                    memory.forward = forward
            return scores.image_score, scores.anomaly_map

        return TimedReads(run, lambda forward, features: forward(features), event)

    return prepare


def search_step(event: Callable[[], Any], search_of: Callable) -> Callable[..., TimedReads]:
    """Scores of one image by a model of bench_end_to_end, with a search of each of its memories."""

    def prepare(model: Any, image: Tensor, *memories: Tensor) -> TimedReads:
        searches = [search_of(keys) for keys in memories]
        score = torch.inference_mode()(model.score)
        return TimedReads(lambda read: score(image, read), lambda memory, query: searches[memory](query), event)

    return prepare


def scoring_cases(card: Card, tiny: bool) -> list[Case]:
    cases = []
    for preset, batch in (("digits", 4),) if tiny else (("mvtec-texture", 20), ("mnist", 64)):

        def model_and_images(preset: str = preset, batch: int = batch) -> tuple[PMB, Tensor]:
            config = PMB.presets()[preset].config
            return PMB(config).eval(), torch.rand(batch, config.channels, config.image_size, config.image_size)

        cases.append(
            Case(
                f"PMB {preset}, batch {batch}",
                inputs=model_and_images,
                providers=[
                    Provider("ours", pmb_step(card.event, ""), is_ours=True),
                    Provider("plain torch", pmb_step(card.event, "reference")),
                ],
                expected=lambda model, images: pmb_step(card.event, "reference")(model, images)(),
                tolerance=1e-3,  # both are float32 networks
            )
        )
    if tiny:
        return cases
    providers = [
        Provider("ours, prepared", search_step(card.event, bench_end_to_end.prepared), is_ours=True),
        Provider("cdist+argmin", search_step(card.event, bench_end_to_end.by_cdist)),
        Provider("mm+argmin", search_step(card.event, bench_end_to_end.by_product)),
    ]

    @torch.inference_mode()
    def exact_step(model: Any, image: Tensor, *memories: Tensor) -> tuple[Tensor, Tensor]:
        return model.score(image, lambda memory, query: float64_search(query, memories[memory]))

    for name, build in (
        ("MemSTC-Net, one image", bench_end_to_end.MemSTC),
        ("PatchCore, one image", bench_end_to_end.PatchCore),
    ):
        cases.append(
            Case(
                name,
                inputs=lambda build=build: bench_end_to_end.fitted(build()),
                providers=providers,
                expected=exact_step,
                tolerance=1e-4,
                error=lambda got, exact: largest_error(got[0], exact[0]),
                wrong=lambda got, exact: float((got[1] != exact[1]).double().mean()),
            )
        )
    return cases


# --- the table ----------------------------------------------------------------------------------------------------

COLUMNS = (
    "op", "case", "ours by", "ms", "best exact peer, ms", "ours is", "target", "share of limit", "error, wrong", "MiB",
)  # fmt: skip


def short_table(results: Sequence[Result]) -> list[str]:
    """One line for each of ours beside the best peer of the same precision, and one for each that failed."""
    lines = []
    for case in comparisons(results):
        mine = [row for row in case.rows if row.is_ours]
        lines += [_line(case, row) for row in mine if row.rounds]
        lines += [
            (row.op, row.case, row.provider, row.skipped, *[""] * (len(COLUMNS) - 4)) for row in mine if row.skipped
        ]
    return table(COLUMNS, lines)


def _line(case: Comparison, row: Result) -> tuple[str, ...]:
    speed = case.speed(row)
    best = case.peers[0] if case.peers else None
    target = "" if row.target is None else f"{row.target:g}x"
    if target and not row.mean_of:
        target += " met" if speed >= (row.target or math.inf) else " missed"
    read = "" if row.read_ms is None else f", read {row.read_ms / row.median_ms:.0%}"
    wrong = "" if row.wrong is None else f", {row.wrong:.0%}"
    return (
        row.op, row.case, row.provider, f"{row.median_ms:.4g} ±{row.spread_ms / 2:.1g}{read}",
        f"{best.provider} {best.median_ms:.4g}" if best else "", "" if math.isnan(speed) else f"{speed:.1f}x", target,
        f"{row.share_of_limit:.0%} of {row.limited_by}" if row.share_of_limit > 0 else "",
        f"{row.error:.0e}{wrong}", f"{row.peak_mib:.0f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program out; nothing is written")
    parser.add_argument("--seconds", type=float, default=520.0, help="what the run may take")
    parser.add_argument("--only", default="", help="ops to measure, separated by commas")
    asked = parser.parse_args()
    start = time.perf_counter()
    device, tiny = asked.device, asked.tiny
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    card = Card.measure(device)
    print(card.describe(), flush=True)
    run = Run(card, asked.seconds, seconds_of_case=0.05 if tiny else 3.0, start=start)
    for op, cases in {
        "nearest_keys": lambda: nearest_keys_cases(device, tiny),
        "histogram_correction": lambda: histogram_correction_cases(device, tiny),
        "gumbel_topk": lambda: gumbel_topk_cases(device, tiny),
        "bank_attention": lambda: bank_attention_cases(device, tiny),
        "stcm_lookup": lambda: stcm_lookup_cases(device, tiny),
        "fifo_write_": lambda: fifo_write_cases(device, tiny),
        "ssim_loss": lambda: ssim_cases(device, tiny),
        "scoring": lambda: scoring_cases(card, tiny),
    }.items():
        if not asked.only or op in asked.only.split(","):
            run.measure(op, cases())

    if device == "cuda" and not tiny:
        for path in save(
            run.results, card.describe(), Path(__file__).with_name("results") / f"{card.results_name}.csv"
        ):
            print(f"wrote {path}")
    print("\n" + card.describe() + "\n")
    print("\n".join(short_table(run.results)))
    print()
    for judgement in judgements(run.results):
        if "geometric mean" in judgement.case:
            print(judgement.line() + (", met" if judgement.is_met else ", missed"))
    for row in run.results:
        if row.skipped and not row.is_ours:
            print(f"- {row.op} {row.case}: {row.provider} did not run: {row.skipped}")
    if run.failures:
        sys.exit("\n".join(["", *run.failures]))


if __name__ == "__main__":
    main()
