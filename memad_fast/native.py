"""The CPU kernels for NumPy arrays, without torch: for an inspection PC that runs its network elsewhere.

Same kernels, same results and same names as the torch ops; arrays are float32. Also tells and sets the
instruction set that the kernels use, for this process, for NumPy and torch alike.

Example:
    >>> import numpy as np
    >>> from memad_fast import native
    >>> corrected, mu, score = native.histogram_correction(np.array([[1, 1, 2, 5]], dtype=np.float32), 0.5)
    >>> corrected.tolist(), mu.tolist(), score.tolist()
    ([[0.0, 0.0, 1.0, 4.0]], [1.0], [5.0])
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from memad_fast._arguments import (
    COMBINES,
    METRICS,
    check_attention_options,
    check_choice,
    check_fraction,
    check_noise_options,
    check_seed,
    check_ssim_window,
)

try:
    from memad_fast import _native
except ImportError as error:
    raise ImportError(
        f"memad_fast.native needs its compiled module, which could not be loaded ({error}). "
        "To fix it: pip install --no-build-isolation . (needs g++, cmake and ninja)"
    ) from error

Array = NDArray[np.float32]

__all__ = [
    "PreparedKeys",
    "bank_attention",
    "bank_attention_stats",
    "gumbel_topk",
    "histogram_correction",
    "isa",
    "isas",
    "nearest_keys",
    "num_threads",
    "prepare_keys",
    "set_isa",
    "set_num_threads",
    "ssim_loss",
    "ssim_map",
    "stcm_lookup",
]


def isas() -> list[str]:
    """The instruction sets this build has and this processor can run, lowest first."""
    return _native.isas()


def isa() -> str:
    """The instruction set in force: the highest, or what ``MEMAD_FAST_ISA`` or ``set_isa`` chose."""
    return _native.isa()


def set_isa(name: str) -> None:
    """Force an instruction set by name for this process; "auto" returns to the highest.

    Raises:
        ValueError: ``name`` cannot run on this processor.
    """
    _native.set_isa(name)


def num_threads() -> int:
    """How many threads the NumPy functions of this module use (torch ops use torch's own setting)."""
    return _native.num_threads()


def set_num_threads(count: int) -> None:
    """Use ``count`` threads (at least 1) in the NumPy functions of this module."""
    _native.set_num_threads(count)


def _float_array(name: str, value: object) -> Array:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(value).__name__}")
    if value.dtype != np.float32:
        raise TypeError(f"{name}: expected float32, got {value.dtype}")
    return np.ascontiguousarray(value)


def gumbel_topk(
    query: Array,
    memory: Array,
    k: int,
    *,
    temperature: float = 1.0,
    seed: int | None = None,
    noise: bool = True,
    combine: str = "sum",
) -> tuple[Array, NDArray[np.int64], Array]:
    """``memad_fast.gumbel_topk`` for float32 arrays ``[N, D]`` and ``[M, D]``: (read, indices, scores).

    ``seed`` ``None`` is drawn from the operating system.
    """
    query, memory = _float_array("query", query), _float_array("memory", memory)
    if query.ndim != 2:
        raise ValueError(f"query: expected 2 dimensions [N, D], got shape {query.shape}")
    if memory.ndim != 2 or memory.shape[1] != query.shape[1]:
        raise ValueError(f"memory: expected shape [M, {query.shape[1]}] like query, got {memory.shape}")
    if not 1 <= k <= memory.shape[0]:
        raise ValueError(f"k: expected 1 to {memory.shape[0]}, the number of memory rows, got {k}")
    check_noise_options(temperature, combine)
    if seed is None:
        seed = secrets.randbits(63)
    check_seed(seed)
    return _native.gumbel_topk(query, memory, k, temperature, seed if noise else None, COMBINES.index(combine))


def _attention_arrays(query: object, bank: object) -> tuple[Array, Array]:
    """Both arrays, checked; the query stays a view where its last dimension is contiguous."""
    if not isinstance(query, np.ndarray) or query.dtype != np.float32:
        query = _float_array("query", query)
    bank = _float_array("bank", bank)
    if query.ndim < 3:
        raise ValueError(f"query: expected at least 3 dimensions [..., P, C, D], got shape {query.shape}")
    if bank.ndim != 3:
        raise ValueError(f"bank: expected 3 dimensions [P, M, D], got shape {bank.shape}")
    if bank.shape[0] != query.shape[-3] or bank.shape[1] == 0 or bank.shape[2] != query.shape[-1]:
        raise ValueError(
            f"bank: expected [{query.shape[-3]}, at least 1, {query.shape[-1]}] like query, got shape {bank.shape}"
        )
    readable = query.strides[-1] == 4 and all(stride >= 0 and stride % 4 == 0 for stride in query.strides)
    return (query if readable else np.ascontiguousarray(query)), bank


def bank_attention(
    query: Array,
    bank: Array,
    *,
    threshold: float,
    shrink: str = "soft",
    renormalize: bool = False,
    similarity: str = "cosine",
    temperature: float = 1.0,
) -> Array:
    """``memad_fast.bank_attention`` for float32 arrays ``[..., P, C, D]`` and ``[P, M, D]``; contiguous result."""
    query, bank = _attention_arrays(query, bank)
    check_attention_options(threshold, shrink, similarity, temperature)
    return _native.bank_attention(query, bank, threshold, shrink, renormalize, similarity, temperature)


def bank_attention_stats(
    query: Array,
    bank: Array,
    *,
    threshold: float,
    shrink: str = "soft",
    similarity: str = "cosine",
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """``memad_fast.bank_attention_stats`` for float32 arrays: (dead_share ``[P]``, entropy ``[P]``)."""
    query, bank = _attention_arrays(query, bank)
    check_attention_options(threshold, shrink, similarity, temperature)
    return _native.bank_attention_stats(query, bank, threshold, shrink, similarity, temperature)


def histogram_correction(error: Array, fraction: float = 0.5) -> tuple[Array, Array, Array]:
    """``memad_fast.histogram_correction`` for a float32 array ``[B, ...]``: (corrected, mu, score)."""
    error = _float_array("error", error)
    if error.ndim < 1:
        raise ValueError("error: expected at least 1 dimension [B, ...], got a 0-dimensional array")
    check_fraction(fraction)
    return _native.histogram_correction(error, fraction)


Indices = NDArray[np.int64]


def _matrix(name: str, value: object, layout: str) -> Array:
    array = _float_array(name, value)
    if array.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions {layout}, got shape {array.shape}")
    return array


def _search_arrays(query: object, keys: object) -> tuple[Array, Array]:
    queries, rows = _matrix("query", query, "[N, D]"), _matrix("keys", keys, "[M, D]")
    if rows.shape[1] != queries.shape[1]:
        raise ValueError(f"keys: expected {queries.shape[1]} like query in dimension 1, got shape {rows.shape}")
    if rows.shape[0] == 0:
        raise ValueError(f"keys: expected at least 1 row, got shape {rows.shape}")
    return queries, rows


class PreparedKeys:
    """Keys packed once for many searches (``prepare_keys``); takes the place of ``keys`` in ``nearest_keys``.

    Attributes:
        keys: ``[M, D]`` a read-only copy of the rows.
        metric: "l2", "cosine" or "ip": the only metric that searches of these keys can use.
        nbytes: bytes of the packed form, beside the keys themselves.
    """

    def __init__(self, keys: Array, metric: str) -> None:
        self.keys = keys
        self.metric = metric
        self._packed = _native.prepare_keys(keys, METRICS.index(metric))
        self.nbytes: int = self._packed.nbytes

    def __len__(self) -> int:
        return self.keys.shape[0]


def prepare_keys(keys: Array, *, metric: str = "l2") -> PreparedKeys:
    """``memad_fast.prepare_keys`` for a float32 array ``[M, D]``. The rows are copied: later changes do not reach them.

    Example:
        >>> import numpy as np
        >>> from memad_fast import native
        >>> prepared = native.prepare_keys(np.eye(3, dtype=np.float32))
        >>> native.nearest_keys(np.array([[0, 0, 2]], dtype=np.float32), prepared)[1].tolist()
        [[2]]
    """
    rows = _matrix("keys", keys, "[M, D]").copy()
    if rows.shape[0] == 0:
        raise ValueError(f"keys: expected at least 1 row, got shape {rows.shape}")
    check_choice("metric", metric, METRICS)
    rows.flags.writeable = False
    return PreparedKeys(rows, metric)


def nearest_keys(query: Array, keys: Array | PreparedKeys, k: int = 1, *, metric: str = "l2") -> tuple[Array, Indices]:
    """``memad_fast.nearest_keys`` for float32 arrays ``[N, D]`` and ``[M, D]``: (distances, indices), each [N, k].

    ``keys`` may be ``PreparedKeys`` of such keys.
    """
    packed = None
    if isinstance(keys, PreparedKeys):
        if keys.metric != metric:
            raise ValueError(f"metric: the keys were prepared for {keys.metric!r}, got {metric!r}")
        packed = keys._packed
    query, rows = _search_arrays(query, keys.keys if isinstance(keys, PreparedKeys) else keys)
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k: expected 1 to {rows.shape[0]} (the number of keys), got {k}")
    check_choice("metric", metric, METRICS)
    return _native.nearest_keys(query, rows, packed, k, METRICS.index(metric))


def stcm_lookup(query: Array, keys: Array, values: Array, *, filled: int | None = None) -> tuple[Array, Array, Indices]:
    """``memad_fast.stcm_lookup`` for float32 arrays: (read [N, V], distances [N], indices [N])."""
    query, keys = _search_arrays(query, keys)
    values = _matrix("values", values, "[M, V]")
    if values.shape[0] != keys.shape[0]:
        raise ValueError(f"values: expected {keys.shape[0]} like keys in dimension 0, got shape {values.shape}")
    filled = keys.shape[0] if filled is None else filled
    if not 1 <= filled <= keys.shape[0]:
        raise ValueError(f"filled: expected 1 to {keys.shape[0]} (the number of keys), got {filled}")
    return _native.stcm_lookup(query, keys, values, filled)


def ssim_loss(
    x: Array, y: Array, *, window_size: int = 11, sigma: float = 1.5, data_range: float = 1.0, padding: str = "valid"
) -> float:
    """``memad_fast.ssim_loss`` for float32 arrays ``[B, C, H, W]``: the mean of 1 − SSIM."""
    x, y = _image_pair(x, y, window_size, sigma, data_range, padding)
    return _native.ssim_loss(x, y, window_size, sigma, data_range, padding == "same")


def ssim_map(
    x: Array, y: Array, *, window_size: int = 11, sigma: float = 1.5, data_range: float = 1.0, padding: str = "valid"
) -> Array:
    """``memad_fast.ssim_map`` for float32 arrays ``[B, C, H, W]``: the SSIM of every window, per channel."""
    x, y = _image_pair(x, y, window_size, sigma, data_range, padding)
    return _native.ssim_map(x, y, window_size, sigma, data_range, padding == "same")


def _image_pair(
    x: Array, y: Array, window_size: int, sigma: float, data_range: float, padding: str
) -> tuple[Array, Array]:
    x, y = _float_array("x", x), _float_array("y", y)
    if x.ndim != 4:
        raise ValueError(f"x: expected 4 dimensions [B, C, H, W], got shape {x.shape}")
    if y.shape != x.shape:
        raise ValueError(f"y: expected shape {x.shape} like x, got {y.shape}")
    check_ssim_window(x.shape, window_size, sigma, data_range, padding)
    return x, y
