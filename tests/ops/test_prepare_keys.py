"""prepare_keys: the packed form follows every overwrite, and prepared keys search as fresh ones do."""

from __future__ import annotations

import pytest
import torch
from devices import NothingWaits, fake_gpu

import memad_fast
from memad_fast.ops import PreparedKeys
from memad_fast.ops.prepare_keys import packed_bytes

METRICS = ["l2", "cosine", "ip"]


def assert_searches_like_its_rows(prepared: PreparedKeys) -> None:
    query = torch.randn(40, prepared.keys.shape[1]).to(prepared.keys.dtype)
    got = memad_fast.nearest_keys(query, prepared, 3, metric=prepared.metric)
    expected = memad_fast.nearest_keys(query, prepared.keys, 3, metric=prepared.metric)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_overwritten_rows_are_found(isa: str, metric: str, dtype: torch.dtype) -> None:
    prepared = memad_fast.prepare_keys(torch.randn(70, 13).to(dtype), metric=metric)
    assert_searches_like_its_rows(prepared)
    assert prepared.overwrite_(50, torch.randn(20, 13).to(dtype) + 5) is prepared
    assert_searches_like_its_rows(prepared)
    prepared.overwrite_(torch.tensor([3, 69, 0]), torch.randn(3, 13).to(dtype) * 100)
    assert_searches_like_its_rows(prepared)
    prepared.overwrite_(torch.tensor([5]), torch.full((1, 13), torch.nan, dtype=dtype))
    assert_searches_like_its_rows(prepared)


def test_far_rows_stay_exact_around_the_old_centre(isa: str) -> None:
    prepared = memad_fast.prepare_keys(torch.randn(100, 8))
    prepared.overwrite_(0, torch.randn(100, 8) + 1e5)
    distances, indices = memad_fast.nearest_keys(prepared.keys, prepared)
    assert indices[:, 0].tolist() == list(range(100))
    assert (distances == 0).all()


def test_of_a_row_named_twice_the_last_stays() -> None:
    prepared = memad_fast.prepare_keys(torch.zeros(20, 2))
    prepared.overwrite_(torch.tensor([4, 7, 4]), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    assert prepared.keys[[4, 7]].tolist() == [[3.0, 3.0], [2.0, 2.0]]
    assert_searches_like_its_rows(prepared)


def test_overwriting_nothing_changes_nothing() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 2))
    before = prepared.keys.clone()
    prepared.overwrite_(20, torch.empty(0, 2))
    prepared.overwrite_(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    assert torch.equal(prepared.keys, before)


def test_tells_what_it_is() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6), metric="ip")
    assert len(prepared) == 20
    assert prepared.metric == "ip"
    assert prepared.packed is not None
    assert prepared.nbytes == prepared.packed.numel() == 64 + 64 + 64 * (24 + 8) + 4096
    assert repr(prepared) == f"PreparedKeys(20 x 6, torch.float32, metric='ip', nbytes={prepared.nbytes})"


def test_keeps_the_rows_by_reference() -> None:
    keys = torch.randn(20, 6)
    prepared = memad_fast.prepare_keys(keys)
    prepared.overwrite_(2, torch.zeros(1, 6))
    assert prepared.keys is keys
    assert (keys[2] == 0).all()


def test_can_be_rebuilt_from_its_tensors() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6), metric="cosine")
    state = {"keys": prepared.keys.clone(), "packed": prepared.packed.clone()}
    assert_searches_like_its_rows(PreparedKeys(state["keys"], state["packed"], "cosine"))


def test_the_reference_serves_float64_unpacked() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6, dtype=torch.float64))
    assert prepared.packed is None
    assert prepared.nbytes == 0
    prepared.overwrite_(3, torch.zeros(2, 6, dtype=torch.float64))
    assert_searches_like_its_rows(prepared)


def test_keys_prepared_for_another_backend_serve_the_reference() -> None:
    query, prepared = torch.randn(9, 6), memad_fast.prepare_keys(torch.randn(20, 6))
    expected = memad_fast.nearest_keys(query, prepared)
    with memad_fast.use_backend("reference"):
        assert torch.equal(memad_fast.nearest_keys(query, prepared)[1], expected[1])


def test_opcheck() -> None:
    keys = torch.randn(20, 6)
    packed = torch.ops.memad_fast.prepare_keys(keys, "l2")
    torch.library.opcheck(torch.ops.memad_fast.prepare_keys.default, (keys, "ip"))
    rows = torch.tensor([3, 19])
    torch.library.opcheck(torch.ops.memad_fast.prepare_keys_rows_.default, (packed, keys, rows, "l2"))


def test_bad_input_names_the_argument() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6))
    with pytest.raises(TypeError, match=r"keys: expected a torch.Tensor, got list"):
        memad_fast.prepare_keys([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keys: expected 2 dimensions"):
        memad_fast.prepare_keys(torch.ones(3))
    with pytest.raises(ValueError, match=r"keys: expected at least 1 row"):
        memad_fast.prepare_keys(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"metric: expected one of"):
        memad_fast.prepare_keys(torch.ones(2, 3), metric="l1")
    with pytest.raises(TypeError, match=r"new_keys: expected torch.float32 like the prepared keys"):
        prepared.overwrite_(0, torch.ones(2, 6).half())
    with pytest.raises(ValueError, match=r"new_keys: expected 6 like the prepared keys"):
        prepared.overwrite_(0, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"rows: expected 2 rows within 0 to 20, got 19 to 21"):
        prepared.overwrite_(19, torch.ones(2, 6))
    with pytest.raises(TypeError, match=r"rows: expected torch.int64"):
        prepared.overwrite_(torch.tensor([1.0, 2.0]), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"rows: expected 2 like new_keys"):
        prepared.overwrite_(torch.tensor([1]), torch.ones(2, 6))
    with pytest.raises(IndexError, match=r"rows: expected 0 to 19, got -1 to 3"):
        prepared.overwrite_(torch.tensor([-1, 3]), torch.ones(2, 6))


def test_rows_changed_behind_its_back_are_refused() -> None:
    keys = torch.randn(6, 3)
    prepared = memad_fast.prepare_keys(keys)
    memad_fast.nearest_keys(keys, prepared.overwrite_(0, torch.zeros(1, 3)))
    keys[2] = 0.0
    with pytest.raises(ValueError, match=r"keys: the rows were changed in place after prepare_keys"):
        memad_fast.nearest_keys(keys, prepared)
    _, indices = memad_fast.nearest_keys(keys, memad_fast.prepare_keys(keys))
    assert indices.flatten().tolist() == [0, 1, 0, 3, 4, 5]


class _PrepareAndSearch(torch.nn.Module):
    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return memad_fast.nearest_keys(query, memad_fast.prepare_keys(keys), 2)


def test_packing_and_searching_compile_and_export_as_one_graph() -> None:
    query, keys = torch.randn(7, 5), torch.randn(40, 5)
    expected = memad_fast.nearest_keys(query, keys, 2)
    compiled = torch.compile(_PrepareAndSearch(), fullgraph=True)(query, keys)
    exported = torch.export.export(_PrepareAndSearch(), (query, keys)).module()(query, keys)
    for got in (compiled, exported):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_of_many_repeated_rows_the_last_of_each_stays() -> None:
    prepared = memad_fast.prepare_keys(torch.zeros(7, 3))
    rows, new_keys = torch.randint(0, 7, (60,)), torch.randn(60, 3)
    expected = prepared.keys.clone()
    for row, key in zip(rows, new_keys, strict=True):
        expected[row] = key
    prepared.overwrite_(rows, new_keys)
    assert torch.equal(prepared.keys, expected)
    assert_searches_like_its_rows(prepared)


def test_refused_rows_write_nothing() -> None:
    prepared = memad_fast.prepare_keys(torch.zeros(7, 3))
    with pytest.raises(IndexError):
        prepared.overwrite_(torch.tensor([2, 7]), torch.ones(2, 3))
    assert not prepared.keys.any()
    assert prepared.is_current


def test_is_current_until_its_rows_change_behind_its_back() -> None:
    prepared = memad_fast.prepare_keys(torch.zeros(7, 3))
    assert prepared.overwrite_(0, torch.ones(2, 3)).is_current
    prepared.keys.add_(1)
    assert not prepared.is_current


@pytest.mark.parametrize("rows", [3, torch.tensor([5, 3, 5])])
def test_nothing_waits_for_a_gpu(rows: int | torch.Tensor) -> None:
    with fake_gpu() as gpu:
        prepared = memad_fast.prepare_keys(torch.randn(20, 6, device=gpu))
        if isinstance(rows, torch.Tensor):
            rows = torch.empty(3, dtype=torch.int64, device=gpu)
        prepared.overwrite_(rows, torch.randn(3, 6, device=gpu))
        for result in memad_fast.nearest_keys(torch.randn(9, 6, device=gpu), prepared):
            assert result.device == gpu


def test_consecutive_rows_are_overwritten_without_a_look_at_them() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6))
    with NothingWaits():
        prepared.overwrite_(3, torch.randn(3, 6))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (128, 64), (129, 65), (3, 0)])
def test_the_packed_form_of_a_gpu_has_its_own_size(rows: int, width: int) -> None:
    padded, columns = -(-rows // 128) * 128, max(-(-width // 64), 1) * 64
    assert packed_bytes(rows, width, on_gpu=True) == padded * (columns + 20) + 4 * columns
    with fake_gpu() as gpu:
        prepared = memad_fast.prepare_keys(torch.empty(rows, width, device=gpu))
        assert prepared.nbytes == packed_bytes(rows, width, on_gpu=True)
    prepared = memad_fast.prepare_keys(torch.zeros(rows, width))
    assert prepared.nbytes == packed_bytes(rows, width, on_gpu=False)


def test_rows_of_another_device_are_refused() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6))
    with pytest.raises(ValueError, match=r"rows: expected device cpu like the prepared keys, got meta"):
        prepared.overwrite_(torch.empty(2, dtype=torch.int64, device="meta"), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"new_keys: expected device cpu like the prepared keys, got meta"):
        prepared.overwrite_(0, torch.ones(2, 6, device="meta"))


def test_a_packed_form_on_another_device_is_refused() -> None:
    prepared = memad_fast.prepare_keys(torch.randn(20, 6))
    assert prepared.packed is not None
    with pytest.raises(ValueError, match=r"packed: expected device meta like keys, got cpu"):
        PreparedKeys(prepared.keys.to("meta"), prepared.packed, "l2")


def test_overwriting_compiles_as_one_graph() -> None:
    def step(keys: torch.Tensor, rows: torch.Tensor, new_keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        prepared = memad_fast.prepare_keys(keys)
        prepared.overwrite_(rows, new_keys).overwrite_(1, new_keys)
        return memad_fast.nearest_keys(query, prepared)[1]

    keys, new_keys = torch.randn(40, 5), torch.randn(3, 5)
    expected, traced = keys.clone(), keys.clone()
    arguments = (torch.tensor([7, 30, 7]), new_keys, torch.randn(9, 5))
    want = step(expected, *arguments)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(traced, *arguments)
    assert torch.equal(got, want)
    assert torch.equal(traced, expected)
