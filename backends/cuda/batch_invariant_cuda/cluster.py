"""What the programs of a cluster tell each other about a row that they share, written in PTX.

Four programs have a row: each a quarter of its 1024 lanes, 256 that lie side by side. Each sends
two numbers of each thread of four warps to all four, and each folds what all have sent: lanes in
the order of `rows.fold`, or the range of numbers. The warps that fold tell the other warps.

A mailbox in a program's shared memory has room for two rows in turn. A program sends the numbers
of the next row but one only after all programs have sent those of the next, so after all have read
these. What a GPU needs (compute capability 9.0): clusters, `st.async`, barriers in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from batch_invariant_cuda import rows

PROGRAMS = gl.constexpr(4)  # of a cluster
WIDTH = gl.constexpr(rows.LANES // 4)  # lanes of a program
WARPS = gl.constexpr(4)  # that send and fold: two lanes in each thread
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))

_MAIL = 4 * rows.LANES  # bytes of a row
_ARRIVED = 2 * _MAIL  # two barriers: what all have sent is here
_TOLD = _ARRIVED + 16  # two barriers: what it came to is here
_RESULT = _TOLD + 16  # two pairs of numbers
MAILBOX = _RESULT + 96  # bytes; off a multiple of 32, copies to what lies behind took longer


@gluon.constexpr_function
def _opening():
    barriers = "".join(
        f"@first mbarrier.init.shared::cta.b64 [$0 + {at}], 1;"
        for at in range(_ARRIVED, _RESULT, 8)
    )
    return f"""{{
        .shared .align 16 .b8 mailbox[{MAILBOX}];
        .reg .b32 thread;
        .reg .pred first;
        mov.u32 $0, mailbox;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        {barriers}
        fence.mbarrier_init.release.cluster; }}"""


@gluon.jit
def open_mailbox():
    """The address of a mailbox. Before the first mail the cluster has to `meet`."""
    steps: gl.constexpr = _opening()
    return gl.inline_asm_elementwise(steps, "=&r", [], gl.int32, False, 1)


@gluon.jit
def meet():
    """Waits for all threads of the cluster."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.u32 $0, 0;",
        "=r", [], gl.int32, False, 1,
    )  # fmt: skip


@gluon.constexpr_function
def _sharing(first_op, second_op, alike):
    """Sends the registers `a0` and `b0` of each thread, folds what has come and tells the result.

    $0, $1: nothing. $2, $3: lanes. $4: the first's number. $6: mailbox. $8: the row's number.
    alike: both numbers are summed, at last to one; -0 becomes +0, as in `rows.fold`.
    """
    text = f"""
        .reg .b32 turn, phase, mail, arrived, told, result, own, there, barrier, t;
        .reg .f32 other;
        .reg .pred first, here;
        and.b32 turn, $8, 1;
        bfe.u32 phase, $8, 1, 1;
        mad.lo.u32 mail, turn, {_MAIL}, $6;
        mad.lo.u32 result, turn, 8, $6;
        add.u32 arrived, result, {_ARRIVED};
        add.u32 told, result, {_TOLD};
        setp.eq.u32 first, $4, 0;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [arrived], {_MAIL};
        mov.u32 t, %cluster_ctarank;
        mad.lo.u32 own, t, {_MAIL // PROGRAMS.value}, mail;
        mad.lo.u32 own, $4, 4, own;"""
    for program in range(PROGRAMS.value):
        text += f"""
        mapa.shared::cluster.u32 there, own, {program};
        mapa.shared::cluster.u32 barrier, arrived, {program};
        st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32
            [there], {{a0, b0}}, [barrier];"""
    text += """
        AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 here, [arrived], phase;
        @!here bra AGAIN;
        mov.u32 t, %laneid;
        mad.lo.u32 mail, t, 8, mail;"""
    for i in range(16):
        text += f"""
        ld.shared.v2.f32 {{a{i}, b{i}}}, [mail + {i * 256}];"""
    for half in (8, 4, 2, 1):
        for i in range(half):
            text += f"""
        {first_op} a{i}, a{i}, a{i + half}; {second_op} b{i}, b{i}, b{i + half};"""
    for apart in (16, 8, 4, 2, 1):
        for op, v in ((first_op, "a0"), (second_op, "b0")):
            text += f"""
        shfl.sync.bfly.b32 other, {v}, {apart}, 31, -1; {op} {v}, {v}, other;"""
    if alike:
        text += f"""
        {first_op} a0, a0, b0;
        {first_op} a0, a0, 0f00000000;"""
    return (
        text
        + f"""
        @first st.shared.v2.f32 [result + {_RESULT}], {{a0, b0}};
        @first mbarrier.arrive.release.cta.shared::cta.b64 _, [told];
        mov.b32 $0, $2;
        mov.b32 $1, $3;"""
    )


@gluon.constexpr_function
def _sharing_lanes():
    return """{ .reg .f32 a<16>, b<16>; mov.b32 a0, $2; mov.b32 b0, $3;""" + (
        _sharing("add.rn.f32", "add.rn.f32", True) + "}"
    )


@gluon.constexpr_function
def _sharing_range():
    """$10, $11: numbers for the smallest beside those for the largest, $2 and $3."""
    return """{ .reg .f32 a<16>, b<16>; max.NaN.f32 a0, $2, $3; min.f32 b0, $10, $11;""" + (
        _sharing("max.NaN.f32", "min.f32", False) + "}"
    )


@gluon.jit
def share_lanes(lanes, mailbox, i):
    """Sends the [WIDTH] lanes of a program's i-th row, and tells all warps the sum of all."""
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _sharing_lanes()
    gl.inline_asm_elementwise(
        steps, "=r,=r,r,r,r,r,r,r,r,r", [lanes, lane, lane * 0 + mailbox, lane * 0 + i],
        gl.float32, False, 2,
    )  # fmt: skip


@gluon.jit
def share_range(top, bottom, mailbox, i):
    """Sends [WIDTH] largest and smallest numbers, and tells all warps those of the i-th row."""
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _sharing_range()
    gl.inline_asm_elementwise(
        steps, "=f,=f,f,f,r,r,r,r,r,r,f,f", [top, lane, lane * 0 + mailbox, lane * 0 + i, bottom],
        gl.float32, False, 2,
    )  # fmt: skip


@gluon.constexpr_function
def _hearing():
    """$0, $1: what was told. $2: mailbox. $3: the row's number."""
    return f"""{{
        .reg .b32 turn, phase, result;
        .reg .pred here;
        and.b32 turn, $3, 1;
        bfe.u32 phase, $3, 1, 1;
        mad.lo.u32 result, turn, 8, $2;
        AGAIN: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 here, [result + {_TOLD}], phase;
        @!here bra AGAIN;
        ld.shared.v2.f32 {{$0, $1}}, [result + {_RESULT}]; }}"""


@gluon.jit
def hear(mailbox, i):
    """What was told of a program's i-th row: its largest and smallest, or its sum (first)."""
    steps: gl.constexpr = _hearing()
    return gl.inline_asm_elementwise(
        steps, "=&f,=&f,r,r", [mailbox, i], (gl.float32, gl.float32), False, 1
    )
