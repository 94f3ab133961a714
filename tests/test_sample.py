"""bi.sample: the noise, the filters, and what a row's draw may depend on."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.errors import OpNotSupported
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.philox import philox
from batch_invariant.ops.sample import gumbel, reference
from native_rows import MINUS_LOG1M, Rows, runnable

LIBRARIES = runnable()

# The known-answer vectors of philox4x32-10 in Random123's kat_vectors.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS, ids=["zeros", "ones", "pi"])
def test_philox_has_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), (k0, k1))) == want
    for library in LIBRARIES:
        out = (ctypes.c_uint32 * 4)()
        native = ctypes.CDLL(str(library.path))
        native.bi_philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
        assert tuple(out) == want, library.name


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda rows: rows.name)
def test_the_exponential_is_accurate_at_both_ends(library: Rows) -> None:
    """-log(1 - v) to 1.5 ulp; a v of 2^-32 keeps its digits, which 1 - v would lose."""
    small = torch.exp2(-32 * torch.rand(200_000, generator=torch.Generator().manual_seed(1)))
    v = torch.cat([small, torch.tensor([2.0**-32, 0.25, 0.29, 0.2929, 0.293, 1 - 2.0**-24])])
    v = v.clamp(max=1 - 2.0**-24)
    got = library.map(MINUS_LOG1M, v).double()
    # Above 0.29 the definition rounds 1 - v, as its argument.
    exact = torch.where(v < 0.2928, -torch.log1p(-v.double()), -(1 - v).double().log())
    unit = torch.exp2(exact.log2().floor() - 23)
    assert float(((got - exact).abs() / unit).max()) < 1.5
    naive = library.map(1, 1 - v).neg().double()  # the control
    assert float(((naive - exact).abs() / unit).max()) > 1e5


def logits(rows: int, n: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_draw_knows_nothing_of_its_batch(dtype: torch.dtype) -> None:
    x = logits(40, 3001).to(dtype)
    seeds, positions = torch.arange(40) * 977, torch.arange(40) % 7
    filters: dict[str, Any] = {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 0.001}
    whole = bi.sample(x, seeds, positions, **filters)
    for row in range(40):
        at = slice(row, row + 1)
        assert bi.sample(x[at], seeds[at], positions[at], **filters).equal(whole[at])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert bi.sample(x[order], seeds[order], positions[order], **filters).equal(whole[order])
    as_sequences = bi.sample(x.view(4, 10, -1), seeds.view(4, 10), positions.view(4, 10), **filters)
    assert as_sequences.equal(whole.view(4, 10))
    # The control: another seed, or another position, draws other columns.
    assert (bi.sample(x, seeds + 1, positions, **filters) != whole).sum() > 20
    assert (bi.sample(x, seeds, positions + 1, **filters) != whole).sum() > 20


def test_every_library_draws_alike() -> None:
    x = logits(16, 5003)
    seeds, positions = torch.arange(16), torch.arange(16)
    heat, least = torch.full((16,), 0.7), torch.full((16,), 0.01)
    want = bi.sample(x, seeds, positions, 0.7, min_p=0.01)
    for library in LIBRARIES:
        for threads in (1, 2):
            out = torch.empty(16, dtype=torch.int64)
            library.with_threads(threads).call(
                "bi_row_sample", 0, 16, 5003, x.data_ptr(), seeds.data_ptr(),
                positions.data_ptr(), heat.data_ptr(), least.data_ptr(), None, out.data_ptr(),
            )  # fmt: skip
            assert out.equal(want), library.name


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Deviations of the statistic from its mean; cells of less than 10 are put together."""
    rare = expected < 10
    cells = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    statistic = float(((cells - wanted) ** 2 / wanted).sum())
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))


DRAWS = 40_000


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("keyed_by", ["seeds", "positions"])
def test_draws_have_the_distribution(filters: dict[str, Any], keyed_by: str) -> None:
    row = logits(1, 61, scale=2.0)
    varied = torch.arange(DRAWS)
    keys = {"seeds": 7, "positions": 11, keyed_by: varied}
    drawn = bi.sample(row.expand(DRAWS, -1), **keys, **filters)
    counts = torch.bincount(drawn, minlength=61)
    expected = DRAWS * probabilities(row[0].double(), **filters)
    assert counts[expected == 0].sum() == 0
    assert chi_square(counts, expected) < 4.5
    warmer = {**filters, "temperature": 1.25 * filters.get("temperature", 1.0)}  # the control
    assert chi_square(counts, DRAWS * probabilities(row[0].double(), **warmer)) > 4.5


def probabilities(
    x: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """The distribution by its definition, in float64."""
    p = (x / temperature).softmax(0)
    order = p.argsort(descending=True)
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[: top_k or len(p)]] = True
    p = p * keep
    before = p[order].cumsum(0) - p[order]
    keep[order] &= before < top_p * p.sum()
    keep &= p >= min_p * p.max()
    return p * keep / (p * keep).sum()


def test_neighbouring_keys_are_independent() -> None:
    """Pairs of draws at consecutive positions, and of consecutive seeds, fill a table evenly."""
    even, step = torch.zeros(DRAWS, 8), 2 * torch.arange(DRAWS)
    expected = torch.full((64,), DRAWS / 64.0).double()
    pairs = {
        "positions": [bi.sample(even, 3, step + offset) for offset in (0, 1)],
        "seeds": [bi.sample(even, step + offset, 5) for offset in (0, 1)],
    }
    for first, second in pairs.values():
        assert chi_square(torch.bincount(8 * first + second, minlength=64), expected) < 4.5
        # The control: one draw, twice.
        assert chi_square(torch.bincount(9 * first, minlength=64), expected) > 4.5


def test_rare_columns_are_drawn_as_often_as_they_should() -> None:
    """A column of probability 2^-14 beside one of almost 1: the upper tail of the noise."""
    x = torch.zeros(1, 2)
    x[0, 1] = -14 * math.log(2)
    drawn = bi.sample(x.expand(2**20, -1), torch.arange(2**20), 0)
    assert 64 - 4 * 8 < int(drawn.sum()) < 64 + 4 * 8


def test_a_filter_keeps_exactly_what_it_says() -> None:
    x = torch.zeros(20_000, 10)  # ties: the lower columns come first
    seeds = torch.arange(20_000)
    assert bi.sample(x, seeds, 0, top_k=3).unique().tolist() == [0, 1, 2]
    assert bi.sample(x, seeds, 0, top_p=0.35).unique().tolist() == [0, 1, 2, 3]
    assert bi.sample(x, seeds, 0, top_p=0.0).unique().tolist() == [0]
    assert bi.sample(x, seeds, 0, top_k=4, top_p=0.5).unique().tolist() == [0, 1]
    x[:, 5:] = -1.0
    assert bi.sample(x, seeds, 0, min_p=0.4).unique().tolist() == [0, 1, 2, 3, 4]
    assert bi.sample(x, seeds, 0, min_p=0.3).unique().tolist() == list(range(10))
    assert bi.sample(x, seeds, 0, min_p=0.4, temperature=2.0).unique().tolist() == list(range(10))


def test_what_is_sorted_changes_no_draw() -> None:
    """top_k as a number sorts few columns, as a tensor with a 0 in it all of them."""
    x = torch.randint(-9, 9, (30, 4001), generator=torch.Generator().manual_seed(3)).float()
    k = torch.full((31,), 40)
    k[30] = 0
    seeds = torch.arange(31)
    longer = torch.cat([x, x[:1]])
    some = bi.sample(x, seeds[:30], 2, top_k=40, top_p=0.9)
    assert bi.sample(longer, seeds, 2, top_k=k, top_p=0.9)[:30].equal(some)


def test_greedy_follows_the_rule_for_ties() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [-0.0, 0.0, -1.0], [0.0, 2.0, math.inf]])
    greedy = bi.sample(x, 5, 9, temperature=0.0, top_k=1, top_p=0.5)
    assert greedy.tolist() == bi.argmax(x, 1).tolist() == [1, 0, 2]
    mixed = bi.sample(
        x.expand(2000, 3, 3), 5, torch.arange(2000)[:, None], torch.tensor([0.0, 1, 1])
    )
    assert mixed[:, 0].unique().tolist() == [1]
    assert mixed[:, 1].unique().tolist() == [0, 1, 2]


def test_special_values() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1, nan, 2], [-inf] * 3, [-inf, 0, -inf], [inf, 5, inf]]).repeat(500, 1)
    drawn = bi.sample(x, torch.arange(2000), 0).view(500, 4)
    assert [column.unique().tolist() for column in drawn.T] == [[-1], [-1], [1], [0, 2]]
    assert bi.sample(x, torch.arange(2000), 0, top_p=0.9).view(500, 4).equal(drawn)
    assert bi.sample(x[:4], 0, 0, temperature=0.0).tolist() == [-1, -1, 1, 0]


def test_seeds_and_positions_use_all_their_bits() -> None:
    """Two keys that differ in one bit have other noise."""
    base = gumbel(torch.tensor([0]), torch.tensor([0]), 64)
    x = torch.zeros(1, 4096)
    first = int(bi.sample(x, 0, 0))
    for bit in (0, 31, 32, 62):
        for seed, position in ((1 << bit, 0), (0, 1 << bit)):
            other = gumbel(torch.tensor([seed]), torch.tensor([position]), 64)
            assert (other != base).all(), (seed, position)
            assert int(bi.sample(x, seed, position)) != first
    assert int(bi.sample(x, -(2**63), 0)) != first


def test_draws_are_those_of_the_definition() -> None:
    x = logits(200, 777)
    one = torch.ones(200)
    want = reference(x, torch.arange(200), torch.arange(200), one, None, 0.7 * one, None, None)
    assert bi.sample(x, torch.arange(200), torch.arange(200), top_p=0.7).equal(want)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be finite, 0 or more, got -0.5"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": torch.tensor([1.0, math.nan])}, ValueError, "temperature"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": math.nan}, ValueError, "min_p"),
        ({"positions": -1}, ValueError, "positions"),
        ({"seeds": 0.5}, TypeError, "seeds must be an integer"),
        ({"seeds": True}, TypeError, "seeds must be an integer"),
        ({"seeds": 2**63}, ValueError, "seeds must fit"),
        ({"seeds": torch.arange(3)}, ValueError, r"seeds has shape \[3\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "no columns"),
        ({"logits": torch.zeros(2, 4, dtype=torch.float64)}, OpNotSupported, "float64"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bi.sample(**{"logits": torch.zeros(2, 4), "seeds": 0, "positions": 0, **changed})


def test_nothing_to_draw() -> None:
    assert bi.sample(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, top_k=2).shape == (0,)
    assert bi.sample(torch.zeros(4), 0, 0).shape == ()
