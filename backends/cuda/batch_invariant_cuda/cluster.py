"""What the programs of a cluster tell each other about a row that they share, written in PTX.

Eight programs have a row: each an eighth of its 1024 lanes, 128 that lie side by side, one for
each thread of four warps. These send their lanes to all programs, or the range of their numbers,
and one warp in each folds what all have sent: lanes in the order of `rows.fold`. It tells the other
warps what it came to.

A mailbox in a program's shared memory has room for lanes of four rows in turn, or for ranges of
two. Lanes of a row are sent only when the program was told the sum of the last row but one, and a
range when all ranges of the row before are there: so all programs are done with the row whose room
is taken. What was told is kept for TOLD rows. What a GPU needs (compute capability 9.0): clusters,
`st.async`, barriers in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from batch_invariant_cuda import rows

PROGRAMS = gl.constexpr(8)  # of a cluster
WIDTH = gl.constexpr(rows.LANES // 8)  # lanes of a program
WARPS = gl.constexpr(4)  # that send: a lane in each thread
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
PAIRS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
TOLD = gl.constexpr(16)  # rows of which what was told is kept; see `row_ring.py`


@dataclass(frozen=True)
class _Mailbox:
    """Bytes of the mail of a row, and for how many rows there is room; both powers of 2."""

    mail: int
    turns: int

    @property
    def barriers(self) -> int:
        """Where they begin: for each turn of the mail, and for each of what is told."""
        return self.turns * self.mail

    @property
    def results(self) -> int:
        """Where they begin: two numbers for each turn of what is told."""
        return self.barriers + 8 * (self.turns + TOLD.value)

    @property
    def size(self) -> int:
        """A multiple of 128: if what lies behind began elsewhere, copies to it took longer."""
        return -(-(self.results + 8 * TOLD.value) // 128) * 128


_LANES = gl.constexpr(_Mailbox(4 * rows.LANES, 4))  # a number for each lane
_RANGES = gl.constexpr(_Mailbox(8 * PROGRAMS.value * WARPS.value, 2))  # two for each warp
MAILBOXES = _LANES.value.size + _RANGES.value.size  # bytes that a kernel may need


@gluon.constexpr_function
def _opening(box):
    barriers = "".join(
        f"@first mbarrier.init.shared::cta.b64 [$0 + {at}], 1;"
        for at in range(box.barriers, box.results, 8)
    )
    return f"""{{
        .shared .align 128 .b8 mailbox{box.mail}[{box.size}];
        .reg .b32 thread;
        .reg .pred first;
        mov.u32 $0, mailbox{box.mail};
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        {barriers}
        fence.mbarrier_init.release.cluster; }}"""


@gluon.jit
def open_lanes():
    """The address of a mailbox for lanes. Before the first mail the cluster has to `meet`."""
    steps: gl.constexpr = _opening(_LANES)
    return gl.inline_asm_elementwise(steps, "=&r", [], gl.int32, False, 1)


@gluon.jit
def open_ranges():
    """The address of a mailbox for ranges."""
    steps: gl.constexpr = _opening(_RANGES)
    return gl.inline_asm_elementwise(steps, "=&r", [], gl.int32, False, 1)


@gluon.jit
def meet():
    """Waits for all threads of the cluster."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.u32 $0, 0;",
        "=r", [], gl.int32, False, 1,
    )  # fmt: skip


@gluon.constexpr_function
def _turn(box, mailbox, row):
    """The registers for a row's mail."""
    return f"""
        .reg .b32 turn, phase, mail, arrived;
        and.b32 turn, {row}, {box.turns - 1};
        bfe.u32 phase, {row}, {box.turns.bit_length() - 1}, 1;
        mad.lo.u32 mail, turn, {box.mail}, {mailbox};
        mad.lo.u32 arrived, turn, 8, {mailbox};
        add.u32 arrived, arrived, {box.barriers};"""


@gluon.constexpr_function
def _told(box, mailbox, row):
    """The registers for what is told of a row."""
    kept = TOLD.value
    return f"""
        .reg .b32 told, result, told_phase;
        and.b32 told, {row}, {kept - 1};
        bfe.u32 told_phase, {row}, {kept.bit_length() - 1}, 1;
        mad.lo.u32 told, told, 8, {mailbox};
        add.u32 result, told, {box.results};
        add.u32 told, told, {box.barriers + 8 * box.turns};"""


@gluon.constexpr_function
def _waiting(barrier, phase, scope):
    return f"""
        AGAIN: mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 here, [{barrier}], {phase};
        @!here bra AGAIN;"""


@gluon.constexpr_function
def _butterfly(*ops):
    """Folds a number of each lane of a warp, for each (register, operation)."""
    return "".join(
        f"shfl.sync.bfly.b32 other, {v}, {apart}, 31, -1; {op} {v}, {v}, other;"
        for apart in (16, 8, 4, 2, 1)
        for v, op in ops
    )


_REGISTERS = """
        .reg .b32 own, there, barrier, lane;
        .reg .f32 other;
        .reg .pred first, here, folds, early;
        setp.eq.u32 first, number, 0;
        setp.lt.u32 folds, number, 32;
        mov.u32 lane, %laneid;
        mov.u32 own, %cluster_ctarank;"""
_TELLING = """
        @first st.shared.v2.f32 [result], {a0, b0};
        @first mbarrier.arrive.release.cta.shared::cta.b64 _, [told];"""


@gluon.constexpr_function
def _sending_lanes():
    """$1: the lane. $2: mailbox. $3: the row's number. $4: a lane's bits."""
    box = _LANES.value
    text = (
        f"{{ .reg .b32 number, before; mov.b32 number, $1; sub.s32 before, $3, {box.turns // 2};"
        + _REGISTERS
        + _told(box, "$2", "before")
        + "setp.lt.s32 early, before, 0; @early bra SEND;"
        + _waiting("told", "told_phase", "cta")
        + "SEND:"
        + _turn(box, "$2", "$3")
        + f"""
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [arrived], {box.mail};
        mad.lo.u32 own, own, {4 * WIDTH.value}, mail;
        mad.lo.u32 own, number, 4, own;"""
    )
    for program in range(PROGRAMS.value):
        text += f"""
        mapa.shared::cluster.u32 there, own, {program};
        mapa.shared::cluster.u32 barrier, arrived, {program};
        st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], $4, [barrier];"""
    return text + "mov.b32 $0, $4; }"


@gluon.constexpr_function
def _folding():
    """$1: the thread's number. $2: mailbox. $3: the row's number."""
    box = _LANES.value
    text = (
        "{ .reg .f32 a<16>, b<16>; .reg .b32 number; mov.b32 number, $1;"
        + _REGISTERS
        + _turn(box, "$2", "$3")
        + _told(box, "$2", "$3")
        + "@!folds bra DONE;"
        + _waiting("arrived", "phase", "cluster")
        + "mad.lo.u32 mail, lane, 8, mail;"
    )
    for i in range(16):
        text += f"""
        ld.shared.v2.f32 {{a{i}, b{i}}}, [mail + {i * 256}];"""
    for half in (8, 4, 2, 1):
        for i in range(half):
            text += f"""
        add.rn.f32 a{i}, a{i}, a{i + half}; add.rn.f32 b{i}, b{i}, b{i + half};"""
    text += _butterfly(("a0", "add.rn.f32"), ("b0", "add.rn.f32"))
    # as the last addition of `rows.fold`: -0 becomes +0
    text += "add.rn.f32 a0, a0, b0; add.rn.f32 a0, a0, 0f00000000; mov.f32 b0, a0;"
    return text + _TELLING + "DONE: mov.b32 $0, $1; }"


@gluon.constexpr_function
def _extreme(op, v):
    """The largest or smallest number of a warp, as whole numbers in the same order.

    A NaN is above infinity: those that max and min give have no sign.
    """
    order = "shr.s32 mask, whole, 31; and.b32 mask, mask, 0x7fffffff; xor.b32 whole, whole, mask;"
    return f"""
        mov.b32 whole, {v}; {order}
        redux.sync.{op}.s32 whole, whole, -1;
        {order} mov.b32 {v}, whole;"""


@gluon.constexpr_function
def _sharing_range():
    """$2: twice the thread's number. $4: mailbox. $6: the row's. $8, $9: large numbers. $10, $11:
    small ones.
    """
    box = _RANGES.value
    fold = _extreme("max", "a0") + _extreme("min", "b0")
    return (
        "{ .reg .f32 a0, b0; .reg .b32 whole, mask, number, warp; .reg .pred sends;"
        "shr.u32 number, $2, 1;"
        "max.NaN.f32 a0, $8, $9; min.f32 b0, $10, $11;"
        + _REGISTERS
        + _turn(box, "$4", "$6")
        + _told(box, "$4", "$6")
        + fold
        + f"""
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [arrived], {box.mail};
        setp.lt.u32 sends, lane, {PROGRAMS.value};
        shr.u32 warp, number, 5;
        mad.lo.u32 own, own, {8 * WARPS.value}, mail;
        mad.lo.u32 own, warp, 8, own;
        mapa.shared::cluster.u32 there, own, lane;
        mapa.shared::cluster.u32 barrier, arrived, lane;
        @sends st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32
            [there], {{a0, b0}}, [barrier];"""
        + _waiting("arrived", "phase", "cluster")
        + """
        @!folds bra DONE;
        mad.lo.u32 mail, lane, 8, mail;
        ld.shared.v2.f32 {a0, b0}, [mail];"""
        + fold
        + _TELLING
        + "DONE: mov.b32 $0, $8; mov.b32 $1, $8; }"
    )


@gluon.jit
def send_lanes(lanes, mailbox, i):
    """Sends the [WIDTH] lanes of a program's i-th row, when the sum of the last but one is told.

    So all programs have sent that one's lanes, and each of them was told the sum of the last but
    one before it: of the row that had the same turn.
    """
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _sending_lanes()
    gl.inline_asm_elementwise(
        steps, "=r,r,r,r,r", [lane, lane * 0 + mailbox, lane * 0 + i, lanes],
        gl.float32, False, 1,
    )  # fmt: skip


@gluon.jit
def fold_lanes(mailbox, i):
    """Folds the lanes that all programs send of the i-th row, and tells the sum.

    Called by four warps of a program, of which the first does it.
    """
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _folding()
    gl.inline_asm_elementwise(
        steps, "=r,r,r,r", [lane, lane * 0 + mailbox, lane * 0 + i], gl.int32, False, 1
    )


@gluon.jit
def share_range(top, bottom, mailbox, i):
    """Sends [2 WIDTH] largest and smallest numbers, and tells all warps those of the i-th row."""
    each = gl.arange(0, 2 * WIDTH, PAIRS)
    steps: gl.constexpr = _sharing_range()
    gl.inline_asm_elementwise(
        steps, "=f,=f,r,r,r,r,r,r,f,f,f,f",
        [each, each * 0 + mailbox, each * 0 + i, top, bottom],
        gl.float32, False, 2,
    )  # fmt: skip


@gluon.constexpr_function
def _hearing(box):
    """$0, $1: what was told. $2: mailbox. $3: the row's number."""
    return (
        "{ .reg .pred here;"
        + _told(box, "$2", "$3")
        + _waiting("told", "told_phase", "cta")
        + "ld.shared.v2.f32 {$0, $1}, [result]; }"
    )


@gluon.jit
def hear_sum(mailbox, i):
    """The sum of the lanes of a program's i-th row."""
    steps: gl.constexpr = _hearing(_LANES)
    total, _ = gl.inline_asm_elementwise(
        steps, "=&f,=&f,r,r", [mailbox, i], (gl.float32, gl.float32), False, 1
    )
    return total


@gluon.jit
def hear_range(mailbox, i):
    """The largest and the smallest number of a program's i-th row."""
    steps: gl.constexpr = _hearing(_RANGES)
    return gl.inline_asm_elementwise(
        steps, "=&f,=&f,r,r", [mailbox, i], (gl.float32, gl.float32), False, 1
    )
